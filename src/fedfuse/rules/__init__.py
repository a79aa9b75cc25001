"""Tensor-wise fusion rules: one file, one rule."""

from fedfuse.rules import mean as mean
from fedfuse.rules import median as median
from fedfuse.rules import trimmed_mean as trimmed_mean
from fedfuse.rules.rule import Rule as Rule
from fedfuse.rules.rule import fuse_uploads as fuse_uploads

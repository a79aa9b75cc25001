"""Tensor-wise fusion rules: one file, one rule."""

from fedfuse.rules import dare as dare
from fedfuse.rules import geometric_median as geometric_median
from fedfuse.rules import karcher as karcher
from fedfuse.rules import krum as krum
from fedfuse.rules import mean as mean
from fedfuse.rules import median as median
from fedfuse.rules import multi_krum as multi_krum
from fedfuse.rules import slerp as slerp
from fedfuse.rules import task_arithmetic as task_arithmetic
from fedfuse.rules import ties as ties
from fedfuse.rules import trimmed_mean as trimmed_mean
from fedfuse.rules.rule import Rule as Rule
from fedfuse.rules.rule import fuse_uploads as fuse_uploads
from fedfuse.rules.rule import stream_fused as stream_fused

"""Fuse files that people already have: adapters, checkpoints and artifacts."""

from fedfuse.fusing.adapters import FusedAdapters as FusedAdapters
from fedfuse.fusing.adapters import fuse_adapters as fuse_adapters
from fedfuse.fusing.comparing import RuleRow as RuleRow
from fedfuse.fusing.comparing import compare_rules as compare_rules
from fedfuse.fusing.files import fuse as fuse

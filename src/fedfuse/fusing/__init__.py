"""Fuse files that people already have: adapters, checkpoints and artifacts."""

from fedfuse.fusing.adapters import FusedAdapters as FusedAdapters
from fedfuse.fusing.adapters import fuse_adapters as fuse_adapters
from fedfuse.fusing.comparing import RuleRow as RuleRow
from fedfuse.fusing.comparing import compare_rules as compare_rules
from fedfuse.fusing.files import fuse as fuse
from fedfuse.fusing.growing import Arrival as Arrival
from fedfuse.fusing.growing import add_adapter as add_adapter
from fedfuse.fusing.growing import arrivals_of as arrivals_of
from fedfuse.fusing.growing import drop_adapter as drop_adapter

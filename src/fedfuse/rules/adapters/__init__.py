"""Rules that fuse low-rank adapters: one file, one rule."""

from fedfuse.rules.adapters import average as average
from fedfuse.rules.adapters import fedex as fedex
from fedfuse.rules.adapters import flora as flora
from fedfuse.rules.adapters import merge as merge
from fedfuse.rules.adapters import svd as svd
from fedfuse.rules.adapters.rule import AdapterRule as AdapterRule
from fedfuse.rules.adapters.rule import FusedChange as FusedChange
from fedfuse.rules.adapters.tensorwise import Tensorwise as Tensorwise

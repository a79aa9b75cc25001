"""Where a configuration becomes objects, and objects become a run: the only room that knows YAML."""

from fedfuse.experiment.comparing import compare as compare
from fedfuse.experiment.comparing import comparison_name as comparison_name
from fedfuse.experiment.comparing import method_entry as method_entry
from fedfuse.experiment.configuration import Config as Config
from fedfuse.experiment.configuration import folder_name as folder_name
from fedfuse.experiment.configuration import read_config as read_config
from fedfuse.experiment.configuration import resolve as resolve
from fedfuse.experiment.result import Observer as Observer
from fedfuse.experiment.result import Result as Result
from fedfuse.experiment.result import is_additive_run as is_additive_run
from fedfuse.experiment.running import run as run
from fedfuse.experiment.running import versions as versions
from fedfuse.experiment.variations import read_variations as read_variations
from fedfuse.experiment.variations import split_outside_brackets as split_outside_brackets

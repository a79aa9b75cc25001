"""Methods: one file, one paper."""

from fedfuse.methods import centralized as centralized
from fedfuse.methods import ensemble as ensemble
from fedfuse.methods import feature_ensemble as feature_ensemble
from fedfuse.methods import fedavg as fedavg
from fedfuse.methods import fedprox as fedprox
from fedfuse.methods import fusefl as fusefl
from fedfuse.methods import local as local

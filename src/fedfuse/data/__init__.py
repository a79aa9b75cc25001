"""Data: read it (sources), split it over clients (partitions), and hand it to a federation."""

from fedfuse.data.dataset import Dataset, Source
from fedfuse.data.federate import FederatedData, federate, from_clients
from fedfuse.data.from_python import from_python
from fedfuse.data.normalize import Normalization
from fedfuse.data.partitions.assignment import Partition

__all__ = [
    "Dataset",
    "FederatedData",
    "Normalization",
    "Partition",
    "Source",
    "federate",
    "from_clients",
    "from_python",
]

"""Ways to split training examples over clients: one file each; importing this package registers them."""

from fedfuse.data.partitions.column import Column
from fedfuse.data.partitions.dirichlet import Dirichlet
from fedfuse.data.partitions.embedding import Embedding
from fedfuse.data.partitions.flwr import Flwr
from fedfuse.data.partitions.iid import Iid
from fedfuse.data.partitions.long_tail import LongTail
from fedfuse.data.partitions.quantity_skew import QuantitySkew
from fedfuse.data.partitions.shards import Shards

__all__ = ["Column", "Dirichlet", "Embedding", "Flwr", "Iid", "LongTail", "QuantitySkew", "Shards"]

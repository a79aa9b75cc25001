"""Ways to read data: one file each; importing this package registers them."""

from fedfuse.data.sources.captioned import Captioned
from fedfuse.data.sources.csv_table import Csv
from fedfuse.data.sources.digits import Digits
from fedfuse.data.sources.huggingface import HuggingFace
from fedfuse.data.sources.image_folder import ImageFolder
from fedfuse.data.sources.npz import Npz
from fedfuse.data.sources.parquet import Parquet
from fedfuse.data.sources.remote import Remote
from fedfuse.data.sources.text import Text

__all__ = ["Captioned", "Csv", "Digits", "HuggingFace", "ImageFolder", "Npz", "Parquet", "Remote", "Text"]

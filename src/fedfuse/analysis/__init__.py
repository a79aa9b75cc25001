"""What explains a result, and what looks wrong in it."""

from fedfuse.analysis.screening import Screening as Screening
from fedfuse.analysis.screening import Suspect as Suspect

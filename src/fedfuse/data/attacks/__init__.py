"""Attacks: what hostile clients do to their data or to what they send; one file, one attack."""

from fedfuse.data.attacks import backdoor as backdoor
from fedfuse.data.attacks import free_rider as free_rider
from fedfuse.data.attacks import label_flip as label_flip
from fedfuse.data.attacks import noise as noise
from fedfuse.data.attacks import none as none
from fedfuse.data.attacks import scaled as scaled
from fedfuse.data.attacks import sign_flip as sign_flip
from fedfuse.data.attacks.attack import Attack as Attack
from fedfuse.data.attacks.attack import HostileClients as HostileClients

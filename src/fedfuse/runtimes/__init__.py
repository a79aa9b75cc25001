"""Runtimes: what carries requests to clients and brings replies back."""

from fedfuse.runtimes import local as local
from fedfuse.runtimes import replay as replay
from fedfuse.runtimes import selected as selected
from fedfuse.runtimes.flower import simulation as simulation

"""The contract: what a method, a client, a runtime and an artifact are. Imports nothing else of fedfuse."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("fedfuse")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "0"

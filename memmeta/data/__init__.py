"""Data sets grouped by class, and the episode sampler that runs on the device."""

from memmeta.data.dataset import DataError, Dataset
from memmeta.data.episodes import Episodes
from memmeta.data.registry import SOURCES, load

__all__ = ["SOURCES", "DataError", "Dataset", "Episodes", "load"]

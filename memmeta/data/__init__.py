"""Data sets by name, and the samplers that draw their tasks on the device."""

from memmeta.data.curves import Points
from memmeta.data.dataset import DataError, Dataset
from memmeta.data.episodes import Episodes
from memmeta.data.registry import SOURCES, Sampler, Split, load, sampler

__all__ = [
    "SOURCES",
    "DataError",
    "Dataset",
    "Episodes",
    "Points",
    "Sampler",
    "Split",
    "load",
    "sampler",
]

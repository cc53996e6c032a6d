"""Data sets by name, and the samplers that draw their tasks on the device."""

from memmeta.data.augmentation import Augmentation, normalisation
from memmeta.data.curves import Points
from memmeta.data.dataset import DataError, Dataset
from memmeta.data.episodes import Episodes
from memmeta.data.host import HostDataset, HostEpisodes
from memmeta.data.registry import SOURCES, Sampler, Split, load, load_host, sampler
from memmeta.data.warp import Warp

__all__ = [
    "SOURCES",
    "Augmentation",
    "DataError",
    "Dataset",
    "Episodes",
    "HostDataset",
    "HostEpisodes",
    "Points",
    "Sampler",
    "Split",
    "Warp",
    "load",
    "load_host",
    "normalisation",
    "sampler",
]

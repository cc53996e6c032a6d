"""Data sets by name, and the samplers that draw their tasks on the device."""

from memmeta._shared.readable import readable
from memmeta.data._augmentation import Augmentation, normalisation
from memmeta.data._curves import Points
from memmeta.data._dataset import DataError, Dataset
from memmeta.data._episodes import Episodes
from memmeta.data._host import HostDataset, HostEpisodes
from memmeta.data._reading import Limits, Reading
from memmeta.data._registry import load, load_host, sampler
from memmeta.data._warp import Warp

__all__ = [
    "Augmentation",
    "DataError",
    "Dataset",
    "Episodes",
    "HostDataset",
    "HostEpisodes",
    "Limits",
    "Points",
    "Reading",
    "Warp",
    "load",
    "load_host",
    "normalisation",
    "sampler",
]

readable(__name__)

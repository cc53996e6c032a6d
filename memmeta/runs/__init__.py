"""Training runs: configuration, training, checkpoints, progress display, and reports."""

from memmeta._shared.readable import readable
from memmeta.runs import checkpoints
from memmeta.runs._config import Config, UserError
from memmeta.runs._folder import RunFolder, new_run
from memmeta.runs._progress import shown
from memmeta.runs._train import train
from memmeta.runs._trainer import make_trainer

__all__ = [
    "Config",
    "RunFolder",
    "UserError",
    "checkpoints",
    "make_trainer",
    "new_run",
    "shown",
    "train",
]

readable(__name__)

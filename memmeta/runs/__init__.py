"""Whole runs: their configuration, training, checkpoints, what a person sees, reports."""

from memmeta.runs import checkpoints
from memmeta.runs._config import Config, UserError
from memmeta.runs._folder import RunFolder, new_run, old_run
from memmeta.runs._interruption import Interrupted, Stopped
from memmeta.runs._progress import shown
from memmeta.runs._train import final_report, train
from memmeta.runs._trainer import Trainer, check_room, make_trainer

__all__ = [
    "Config",
    "Interrupted",
    "RunFolder",
    "Stopped",
    "Trainer",
    "UserError",
    "check_room",
    "checkpoints",
    "final_report",
    "make_trainer",
    "new_run",
    "old_run",
    "shown",
    "train",
]

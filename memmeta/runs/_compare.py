"""Runs compared on the same test episodes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memmeta.data import Limits
from memmeta.meta._evaluation import confidence_interval
from memmeta.runs import _devices as devices
from memmeta.runs._config import Config, UserError
from memmeta.runs._folder import RunFolder
from memmeta.runs._records import Row
from memmeta.runs._stored import confirmed, require_unaltered
from memmeta.runs._trainer import TEST, make_trainer

SAME = (
    *("data", "ways", "shots", "test_queries", "uneven"),
    *("image_size", "channels", "image_fit", "background"),
)
"""Options by which the test episodes are drawn."""


def compare(
    paths: Sequence[Path],
    episodes: int,
    data_dir: Path | None = None,
    network: str | None = None,
    limits: Limits = Limits(),
) -> list[Row]:
    """Accuracies of the newest checkpoints of runs, and paired differences from the first's.

    Episodes without a finite accuracy in one of two runs are left out of their difference.

    Args:
        paths: run folders, two or more.
        episodes: test episodes, two or more.
        data_dir: the folder of the runs' data, if these are not part of the package.
        network: the network of the user's own that the runs have; None without one.
        limits: limits on what data files may contain.

    Returns:
        One row a run.

    Raises:
        UserError: there are fewer than two runs, or they have other episodes.
    """
    if len(paths) < 2:
        raise UserError(f"runs: expected at least two run folders, found {len(paths)}")
    if episodes < 2:
        raise UserError(f"--episodes: expected at least 2, found {episodes}")
    configs = [RunFolder(path).config() for path in paths]
    for path, config in zip(paths, configs, strict=True):
        for name in SAME:
            found, first = getattr(config, name), getattr(configs[0], name)
            if found != first:
                raise UserError(
                    f"{path}: its {name} is {found}, that of {paths[0]} {first}; runs are compared "
                    "on the same episodes"
                )
    found = [
        _accuracies(RunFolder(path), confirmed(config, data_dir, network), episodes, limits)
        for path, config in zip(paths, configs, strict=True)
    ]
    rows = []
    for path, config, accuracy in zip(paths, configs, found, strict=True):
        name, own = path.resolve().name, accuracy[np.isfinite(accuracy)]
        pairs = (accuracy - found[0])[np.isfinite(accuracy) & np.isfinite(found[0])]
        difference = None if path is paths[0] else confidence_interval(pairs)
        rows.append(Row(name, config.method, episodes, confidence_interval(own), difference))
    return rows


def _accuracies(folder: RunFolder, config: Config, episodes: int, limits: Limits) -> Any:
    require_unaltered(folder, folder.config())
    made = make_trainer(config, devices.chosen(None, config.tasks), limits)
    trainer, state = made.restored(folder.checkpoints)
    return trainer.accuracies(state, "test", trainer.usual, episodes, TEST)

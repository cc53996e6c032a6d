"""The data sets, and embedded ones drawn at their sizes."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.problems.as_released import QUERIES, SHOTS, WAYS, Setting
from memmeta.data import DataError, Episodes, HostDataset, HostEpisodes, load_host


def read(setting: Setting, split: str, data_dir: Path | None) -> HostDataset:
    """One split, `[classes, examples, side, side, 3]`.

    Raises:
        DataError: the data are not in `data_dir`; the message says which and what to do.
    """
    if data_dir is not None:
        cifar = setting.data in ("cifar_fs", "fc100")
        places = [data_dir / "cifar100", data_dir / ".memmeta" / setting.data]
        if cifar and not any(place.exists() for place in places):
            raise DataError(
                f"{setting.data}: {places[0]} is missing; memmeta.data.load({setting.data!r}, "
                f"'train', {str(data_dir)!r}) downloads and prepares it"
            )
        return load_host(setting.data, split, data_dir)
    found = load_host(setting.data, split)
    nearest = np.arange(setting.side) * found.rows.shape[1] // setting.side
    images = found.rows[:, nearest][:, :, nearest]
    return replace(found, rows=np.broadcast_to(images, (*images.shape[:-1], 3)).copy())


def sampler(dataset: HostDataset) -> HostEpisodes:
    """5-way 5-shot tasks with 25 query images, as the paper's.

    Of emoji each concept has a few designs: support and query are of different ones.
    """
    episodes = HostEpisodes(Episodes(WAYS, SHOTS, QUERIES, cross_family=dataset.name == "emoji"))
    episodes.check(dataset)
    return episodes

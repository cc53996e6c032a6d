"""Defaults of episodes that fit the data."""

from collections.abc import Sequence
from dataclasses import replace

from memmeta.data import DataError, Dataset, Episodes
from memmeta.data._dataset import say_once


def fitting(episodes: Episodes, splits: Sequence[Dataset]) -> Episodes:
    """The episodes with as many query examples of each class as the data have, at most as they are.

    Args:
        episodes: the sampler; its `queries` are the default of an option.
        splits: the data that it is to draw from.

    Returns:
        A sampler that fits all splits if there is one, and otherwise `episodes`.
    """
    for queries in range(episodes.queries, 0, -1):
        fewer = replace(episodes, queries=queries)
        if all(_fits(fewer, split) for split in splits):
            if queries < episodes.queries:
                say_once(
                    f"{queries} query examples of each class, where {episodes.queries} are usual: "
                    f"{' and '.join(f'{split.name}/{split.split}' for split in splits)} have no "
                    f"more with shots={episodes.shots}"
                )
            return fewer
    return episodes


def _fits(episodes: Episodes, split: Dataset) -> bool:
    try:
        episodes.require(split)
    except DataError:
        return False
    return True

"""5-way 1-shot tasks of glyphs, and a small network whose features their heads are trained on."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from jaxtyping import Array

import memmeta as mm
from memmeta.data import Dataset, Episodes
from memmeta.models import Network


@cache
def _sampler() -> Callable[[Array, int], Any]:
    dataset = mm.data.load("glyphs", "train")
    assert isinstance(dataset, Dataset)
    sample = jax.jit(Episodes(ways=5, shots=1, queries=5).sample_batch, static_argnums=2)
    return lambda key, count: sample(dataset, key, count)


def glyph_tasks(key: Array, count: int) -> Any:
    """`count` tasks of the training scripts, with 5 queries a class."""
    return _sampler()(key, count)


def features(width: int) -> tuple[Network, Any]:
    """A Conv4 of so many filters, and θ: its body at random."""
    network = mm.models.conv4(ways=5, width=width)
    return network, {"body": network.init(jax.random.key(0))["body"]}

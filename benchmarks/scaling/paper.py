"""Bytes a device of a meta-step on a sharded decoder with low-rank φ, from shapes alone.

D devices share each matrix and the data; a device works on one task after another. It holds its
part of θ, of Adam's moments and of the data, the program's arguments; and beside them at the peak
as many copies of each thing as `Copies` says. Those numbers are not derived: they are those of
XLA's programs for a CPU (jax 0.10.2), read off from how the bytes grow with each size of a decoder,
and hold for layers that are computed anew (nothing_saveable). The command compares them with
compiled programs, the one of the size in question too.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from benchmarks.scaling import decoder
from benchmarks.scaling.decoder import Shape

FLOAT = 4
"""Bytes of a number: all of it is float32 or int32."""


class Copies(NamedTuple):
    """How many of each thing a device holds at the peak, beside the program's arguments."""

    theta: float = 2.2  # its part: the context's cotangent, the sum over tasks
    phi: float = 10.0  # its part: φ, slopes, vectors of the solver
    inputs: float = 6.0  # of all layers, kept for the backward passes
    layer: float = 4.0  # its matrices gathered, their tangents and gradients
    table: float = 4.0  # of words, gathered too: read with and written with
    outputs: float = 4.0  # logits, tangents, cotangents
    scores: float = 8.0  # of attention in one layer, likewise


def part_of_device(theta: Any, devices: int) -> int:
    """Bytes of a device's part of a tree like θ, what is not sharded as a whole."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    specs = jax.tree.leaves(decoder.layout(theta), is_leaf=is_spec)
    shared = zip(jax.tree.leaves(theta), specs, strict=True)
    return sum(leaf.size * FLOAT // (devices if any(spec) else 1) for leaf, spec in shared)


def arguments(shape: Shape, devices: int, each: int) -> dict[str, float]:
    """Bytes a device of what a meta-step is given; `each` tasks are on a device."""
    theta = jax.eval_shape(lambda key: decoder.parameters(shape, key), jax.random.key(0))
    data = jax.eval_shape(lambda key: decoder.tasks(shape, each, key), jax.random.key(0))
    own = part_of_device(theta, devices)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(data)) / devices
    return {"θ": own, "Adam's moments": 2 * own, "data": FLOAT * numbers}


def temporary(shape: Shape, devices: int, copies: Copies | None = None) -> dict[str, float]:
    """Bytes a device of everything else, for a `shape` with a rank."""
    copies = Copies() if copies is None else copies
    theta = jax.eval_shape(lambda key: decoder.parameters(shape, key), jax.random.key(0))
    sequences = shape.batch / devices
    tokens = sequences * shape.length
    squares = sequences * shape.heads * shape.length**2
    return {
        "gradients of θ": copies.theta * part_of_device(theta, devices),
        "φ, inner state, solver": copies.phi
        * part_of_device({"factors": theta["factors"]}, devices),
        "inputs of the layers": copies.inputs * FLOAT * shape.layers * tokens * shape.width,
        "a layer, gathered": copies.layer * FLOAT * shape.in_layer,
        "attention in a layer": copies.scores * FLOAT * squares,
        "table of words, gathered": copies.table * FLOAT * shape.words * shape.width,
        "logits": copies.outputs * FLOAT * tokens * shape.words,
    }

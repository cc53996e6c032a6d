"""The best matrix product in each precision: what a chip's matrix units can do."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness.tables import Row
from benchmarks.harness.timing import in_turn


class Precision(NamedTuple):
    """How networks and products compute.

    Attributes:
        dtype: of a network's body.
        products: of float32 numbers, as `jax.default_matmul_precision` calls it.
    """

    dtype: Any
    products: str


PRECISIONS = {
    "float32": Precision(jnp.float32, "highest"),
    "TF32": Precision(jnp.float32, "tensorfloat32"),
    "bfloat16": Precision(jnp.bfloat16, "default"),
}
SIZES, QUICK_SIZES, ROUNDS = (4096, 8192), (512,), 9

PUBLISHED = {
    "H100 80GB HBM3": {"float32": 67e12, "TF32": 494.7e12, "bfloat16": 989.4e12},
    "H200": {"float32": 67e12, "TF32": 494.7e12, "bfloat16": 989.4e12},
    "A100-SXM": {"float32": 19.5e12, "TF32": 156e12, "bfloat16": 312e12},
}
"""Dense FLOP/s of the makers' data sheets, by a part of the device's name."""


@cache
def best_product(precision: str, quick: bool) -> float:
    """FLOP/s of the best product of two square matrices."""
    found = []
    for size in QUICK_SIZES if quick else SIZES:
        matrix = jnp.ones((size, size), PRECISIONS[precision].dtype)
        with jax.default_matmul_precision(PRECISIONS[precision].products):
            multiply = jax.jit(jnp.dot).lower(matrix, matrix).compile()

        def call(multiply: Any = multiply, matrix: Any = matrix) -> None:
            multiply(matrix, matrix).block_until_ready()

        call()
        found.append(2 * size**3 / in_turn({size: call}, ROUNDS)[size].min())
    return max(found)


def published(precision: str) -> float | None:
    """FLOP/s on the data sheet; None for a device that is not in the list."""
    kind = jax.devices()[0].device_kind
    return next((peaks[precision] for name, peaks in PUBLISHED.items() if name in kind), None)


def rows(quick: bool) -> Iterator[Row]:
    """Measured and published TFLOP/s of each precision."""
    for name in PRECISIONS:
        known = published(name)
        row: Row = {"precision": name, "TFLOP/s": best_product(name, quick) / 1e12}
        yield row | {"published": known and known / 1e12}

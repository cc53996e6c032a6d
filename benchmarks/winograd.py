"""Winograd's convolution beside the direct one: a form that was tried and is not taken.

    python -m benchmarks.winograd [--size 14] [--images 80] [--cores 1] [--repeats N]
        [--cpu-time] [--out DIR]

A 3x3 convolution of 64 channels to 64 filters on tiles of 2x2 positions: the images' tiles and the
kernel are transformed, multiplied entry by entry of a tile (16 matrix products in the place of 36
positions' worth), and transformed back; a few images at a time. Forward and kernel's gradient in
both forms: milliseconds, and the largest difference over the largest value. Writes winograd.json.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from benchmarks.speed import in_turn
from benchmarks.tables import Row, show, write
from memmeta.models import _convolution_forms as forms
from memmeta.models._image_chunks import images_at_a_time

# Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), equation 10.
INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
KERNEL = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
TILE = range(4)


def combined(row: Any, terms: list[Array]) -> Array:
    """Σ_k row[k] terms[k], for entries of 0, 1 and -1."""
    parts = [int(sign) * term for sign, term in zip(row, terms, strict=True) if sign]
    return sum(parts[1:], parts[0])


def tiles_of(
    images: Float[Array, "n height width channels"], padding: int, transform: Any
) -> list[list[Array]]:
    """The transformed tiles, one (tiles, channels) array an entry of a tile."""
    _, height, width, channels = images.shape
    size = transform.shape[1]
    down, across = -(-height // 2), -(-width // 2)
    after = [padding + 2 * count - side for count, side in ((down, height), (across, width))]
    padded = jnp.pad(images, ((0, 0), (padding, after[0]), (padding, after[1]), (0, 0)))
    rows = [padded[:, k : k + 2 * down - 1 : 2] for k in range(size)]
    rows = [combined(row, rows) for row in transform]
    columns = [[each[:, :, k : k + 2 * across - 1 : 2] for k in range(size)] for each in rows]
    found = [[combined(row, each).reshape(-1, channels) for row in transform] for each in columns]
    return list(lax.optimization_barrier(found))


def convolve(images: Array, kernel: Array) -> Array:
    """Some images, forwards."""
    count, height, width, _ = images.shape
    transformed = jnp.einsum("ir,js,rscf->ijcf", KERNEL, KERNEL, kernel)
    tiles = tiles_of(images, 1, INPUT)
    products = [[tiles[i][j] @ transformed[i, j] for j in TILE] for i in TILE]
    products = list(lax.optimization_barrier(products))
    rows = [[combined(row, [products[k][j] for k in TILE]) for j in TILE] for row in OUTPUT]
    corners = [[combined(row, each) for row in OUTPUT] for each in rows]
    shape = (count, -(-height // 2), -(-width // 2), kernel.shape[-1])
    lines = [jnp.stack([corner.reshape(shape) for corner in each], 3) for each in corners]
    whole = jnp.stack(lines, 2).reshape(count, 2 * shape[1], 2 * shape[2], shape[3])
    return whole[:, :height, :width]


def kernel_gradient(images: Array, cotangents: Array) -> Array:
    """Some images' part of the kernel's gradient, still transformed."""
    left, right = tiles_of(images, 1, INPUT), tiles_of(cotangents, 0, OUTPUT.T)
    return jnp.stack([jnp.stack([left[i][j].T @ right[i][j] for j in TILE]) for i in TILE])


def forward_by_chunks(images: Array, kernel: Array, size: int) -> Array:
    """All images, `size` at a time."""
    chunks = images.reshape(-1, size, *images.shape[1:])
    return lax.map(lambda some: convolve(some, kernel), chunks).reshape(*images.shape[:3], -1)


def kernel_gradient_by_chunks(images: Array, cotangents: Array, size: int) -> Array:
    """All images, `size` at a time."""

    def add(total: Array, start: Array) -> tuple[Array, None]:
        some = [lax.dynamic_slice_in_dim(x, start, size) for x in (images, cotangents)]
        return total + kernel_gradient(*some), None

    zeros = jnp.zeros((4, 4, images.shape[-1], cotangents.shape[-1]))
    total, _ = lax.scan(add, zeros, jnp.arange(0, len(images), size))
    return jnp.einsum("ir,js,ijcf->rscf", KERNEL, KERNEL, total)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=14)
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the process's own")
    parser.add_argument("--out", type=Path, default=Path("build/winograd"))
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (options.images, options.size, options.size, 64)
    images, cotangents = (jax.random.normal(key, shape) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (3, 3, 64, 64)) / 24
    direct: dict[str, tuple[Callable[..., Array], Array]] = {
        "forward": (forms.convolve_one, kernel),
        "kernel's gradient": (
            lambda x, g: forms.kernel_gradient_in_turn(x[None], g[None], (3, 3))[0],
            cotangents,
        ),
    }
    by_chunks = {"forward": forward_by_chunks, "kernel's gradient": kernel_gradient_by_chunks}
    programs = {
        ("direct", "", name): jax.jit(function).lower(images, second).compile()
        for name, (function, second) in direct.items()
    }
    for positions in (400, 1000, 2000):
        size = images_at_a_time(options.images, options.size**2, positions)
        for name, function in by_chunks.items():
            lowered = jax.jit(function, static_argnums=2).lower(images, direct[name][1], size)
            programs["Winograd", f"{size} images at a time", name] = lowered.compile()
    results = {run: program(images, direct[run[2]][1]) for run, program in programs.items()}

    def call(run: tuple[str, str, str]) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(programs[run](images, direct[run[2]][1]))

    seconds = in_turn({run: call(run) for run in programs}, options.repeats, options.cpu_time)
    rows: list[Row] = []
    for form, how in dict.fromkeys(run[:2] for run in programs):
        row: Row = {"form": form, "": how}
        for name in direct:
            expected, found = results["direct", "", name], results[form, how, name]
            row[f"{name}, ms"] = round(1e3 * float(np.min(seconds[form, how, name])), 2)
            row[f"{name}, off by"] = float(abs(found - expected).max() / abs(expected).max())
        rows.append(row)
    show(f"{shape} -> 64, {options.cores} cores", rows)
    write(options.out / "winograd.json", {"rows": rows})


if __name__ == "__main__":
    main()

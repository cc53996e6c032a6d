"""What the convolutions of a Conv4 reach, layer by layer, of the machine's matrix products.

    python -m benchmarks.convolutions [--workload a] [--cores 1] [--repeats N]
        [--cpu-time] [--out DIR]

For each block of a workload's network on one task's images: GFLOP/s of the forward convolution, of
the kernel's gradient and of the images' gradient by the form this platform takes, beside the best
sgemm of the same process; and milliseconds of the whole block's gradient. Writes convolutions.json.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed import in_turn, sgemm
from benchmarks.tables import Row, show, write


def layers(workload: Any) -> list[tuple[int, int, int, int]]:
    """Height, width, channels and filters of each block's convolution."""
    height, width, channels = workload.image_shape
    found = []
    for _ in range(workload.depth):
        found.append((height, width, channels, workload.width))
        height, width, channels = height // 2, width // 2, workload.width
    return found


def prepared(examples: int, layer: tuple[int, int, int, int]) -> dict[str, Callable[[], Any]]:
    """Name -> a compiled call of one layer."""
    import jax
    import jax.numpy as jnp

    from memmeta.models._conv4 import ConvBlock
    from memmeta.models._convolution import conv

    height, width, channels, filters = layer
    images = jnp.ones((examples, height, width, channels))
    kernel, cotangent = jnp.ones((3, 3, channels, filters)), jnp.ones((*images.shape[:3], filters))
    block, weights = ConvBlock(filters), jnp.ones(examples)
    params = block.init(jax.random.key(0), images[:1], weights[:1])

    def loss(params: Any, images: Any) -> Any:
        return jnp.sum(jnp.square(jnp.asarray(block.apply(params, images, weights))))

    functions = {
        "forward": (conv, (images, kernel)),
        "kernel's gradient": (
            lambda x, g: jax.vjp(lambda k: conv(x, k), kernel)[1](g),
            (images, cotangent),
        ),
        "images' gradient": (
            lambda k, g: jax.vjp(lambda x: conv(x, k), images)[1](g),
            (kernel, cotangent),
        ),
        "block": (jax.grad(loss, (0, 1) if channels == filters else 0), (params, images)),
    }

    def call(function: Any, arguments: Any) -> Callable[[], Any]:
        program = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(program(*arguments))

    return {name: call(*given) for name, given in functions.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=("a", "b32", "b84"), default="a")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the process's own")
    parser.add_argument("--out", type=Path, default=Path("build/convolutions"))
    options = parser.parse_args(arguments)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    # not before now: JAX's backend starts with the cores it finds
    from benchmarks.workloads import WORKLOADS

    load = WORKLOADS[options.workload]
    calls: dict[Any, Callable[[], Any]] = {"sgemm": sgemm()}
    for layer in layers(load):
        calls |= {(layer, name): call for name, call in prepared(load.images, layer).items()}
    for call in calls.values():
        call()
    seconds = {
        name: float(np.min(each))
        for name, each in in_turn(calls, options.repeats, options.cpu_time).items()
    }
    peak = 2 * 2048**3 / seconds["sgemm"]
    rows: list[Row] = []
    for layer in layers(load):
        height, width, channels, filters = layer
        work = 2 * load.images * height * width * 9 * channels * filters
        row: Row = {"layer": f"{height}x{width}x{channels} -> {filters}", "GFLOP": work / 1e9}
        for name in ("forward", "kernel's gradient", "images' gradient"):
            wanted = name != "images' gradient" or channels == filters
            row[name] = f"{work / seconds[layer, name] / 1e9:.0f}" if wanted else ""
        row["block, ms"] = round(1e3 * seconds[layer, "block"], 2)
        rows.append(row)
    title = f"GFLOP/s, {load.images} images, {options.cores} cores, sgemm {peak / 1e9:.0f}"
    show(title, rows)
    write(options.out / "convolutions.json", {"sgemm GFLOP/s": peak / 1e9, "rows": rows})


if __name__ == "__main__":
    main()

"""The three sums of each convolution of b84, alone, and the forms that they can be asked for in.

    forward  y = conv(x, K)      kernel  dK = Σ_n x[n] ⋆ dy[n]      images  dx = conv(dy, K')

Tasks share a kernel where features are computed once for all; each has its own where a network
adapts. What the blocks reach together bounds what a meta-step on them can.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.accelerator.meta_steps import attempted, said, side_by_side, small
from benchmarks.accelerator.products import PRECISIONS, best_product
from benchmarks.harness.tables import Row
from benchmarks.harness.timing import in_turn
from benchmarks.problems.workloads import WORKLOADS, Workload

ROUNDS = 9
PRECISION = "bfloat16"
Sum = Callable[[Array, Array], Array]


def convolve(images: Array, kernel: Array) -> Array:
    """[examples height width channels] with [3 3 channels filters]."""
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def kernel_gradient(images: Array, cotangents: Array) -> Array:
    """As XLA transposes `convolve`."""
    shape = (3, 3, images.shape[-1], cotangents.shape[-1])
    like = jax.ShapeDtypeStruct(shape, images.dtype)
    transposed = jax.linear_transpose(lambda kernel: convolve(images, kernel), like)
    gradient: Array = transposed(cotangents)[0]
    return gradient


def kernel_gradient_as_convolution(images: Array, cotangents: Array) -> Array:
    """Channels in the place of examples, examples in the place of channels."""
    found = lax.conv_general_dilated(
        images.transpose(3, 1, 2, 0),
        cotangents.transpose(1, 2, 0, 3),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return found.transpose(1, 2, 0, 3)


def image_gradient(cotangents: Array, kernel: Array) -> Array:
    """A convolution with the kernel turned round."""
    return convolve(cotangents, kernel[::-1, ::-1].swapaxes(2, 3))


def together(one: Sum) -> Sum:
    """All tasks, each with its own kernel, as one grouped convolution."""
    return jax.vmap(one)


def in_order(one: Sum) -> Sum:
    """One task after the other."""
    return lambda *arrays: lax.map(lambda pair: one(*pair), arrays)


class Ask(NamedTuple):
    """One sum of one block in one form."""

    block: int
    name: str
    form: str
    function: Sum
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    flops: float


def asked(load: Workload) -> Iterator[Ask]:
    """All blocks with a kernel for all tasks; the second block in every form with one a task."""
    height, width, channels = load.image_shape
    every, own = (load.images * load.tasks,), (load.tasks, load.images)
    for block in range(1, load.depth + 1):
        here, there = (height, width, channels), (height, width, load.width)
        flops = 2.0 * height * width * 9 * channels * load.width * load.images * load.tasks
        kernel = (3, 3, channels, load.width)
        sums: list[Any] = [
            ("forward", convolve, (here, kernel)),
            ("kernel", kernel_gradient, (here, there)),
            ("images", image_gradient, (there, kernel)),
        ]
        # of the first block's images no gradient is asked
        for name, one, shapes in sums if block > 1 else sums[:2]:
            forms: list[Any] = [("one kernel", one, every)]
            if block == 2:
                forms += [("one a task, together", together(one), own)]
                forms += [("one a task, in turn", in_order(one), own)]
            if block == 2 and name == "kernel":
                forms += [("as a convolution", kernel_gradient_as_convolution, every)]
            for form, function, leading in forms:
                yield Ask(block, name, form, function, with_examples(shapes, leading), flops)
        height, width, channels = height // 2, width // 2, load.width


def with_examples(shapes: Any, leading: tuple[int, ...]) -> Any:
    """Leading axes of images (rank 3): tasks and examples, or both in one; of kernels: tasks."""
    return tuple((*(leading if len(shape) == 3 else leading[:-1]), *shape) for shape in shapes)


def prepared(ask: Ask) -> Callable[[], None]:
    """A function that computes the sum once."""
    arrays = [jnp.ones(shape, PRECISIONS[PRECISION].dtype) for shape in ask.shapes]
    program = jax.jit(ask.function).lower(*arrays).compile()

    def once() -> None:
        program(*arrays).block_until_ready()

    return once


def rows(quick: bool) -> Iterator[Row]:
    """TFLOP/s of each sum, and of all blocks together with one kernel."""
    load = WORKLOADS["b84"]
    asks = list(asked(small(load) if quick else load))
    made = side_by_side([partial(prepared, ask) for ask in asks])
    found = dict(zip(asks, made, strict=True))
    for ask, call in found.items():
        if not isinstance(call, Exception):
            found[ask] = attempted(call) or call
    ready = {ask: call for ask, call in found.items() if not isinstance(call, Exception)}
    seconds = in_turn(ready, 2 if quick else ROUNDS, patience=1.0)
    product = best_product(PRECISION, quick)
    for ask, call in found.items():
        row: Row = {"block": ask.block, "sum": ask.name, "form": ask.form}
        if isinstance(call, Exception):
            yield row | {"said": said(call)}
            continue
        rate = ask.flops / float(np.median(seconds[ask]))
        yield row | {"TFLOP/s": rate / 1e12, "of product": rate / product}
    alone = [ask for ask in asks if ask.form == "one kernel"]
    if all(ask in seconds for ask in alone):
        total = sum(float(np.median(seconds[ask])) for ask in alone)
        rate = sum(ask.flops for ask in alone) / total
        row = {"block": "all", "sum": "all", "form": "one kernel", "TFLOP/s": rate / 1e12}
        yield row | {"of product": rate / product}

"""Where memory grows with the inner steps, and where it does not: by who adapts.

    python -m benchmarks.adapting [--steps 5 50] [--size 84] [--width 32]

Temporary memory of one compiled meta-step, as the compiler reports it (nothing is run), of one
5-way 5-shot task of RGB images with Conv4. Prints one row a method.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import memmeta as mm
from memmeta.few_shot.algorithms import Learner

RATE = 0.1
METHODS: dict[str, tuple[Callable[..., Learner], str]] = {
    "maml": (mm.algorithms.maml, "everything"),
    "imaml": (mm.algorithms.imaml, "everything"),
    "itd_bio, features each step": (
        lambda network, inner: mm.algorithms.itd_bio(network, inner=inner, recompute_features=True),
        "head",
    ),
    "itd_bio": (mm.algorithms.itd_bio, "head"),
    "memory_reduced": (mm.algorithms.memory_reduced, "head"),
}
"""Each method, and who adapts."""


def megabytes(make: Callable[..., Learner], steps: int, size: int, width: int) -> float:
    """Temporary memory of one meta-step with `steps` inner steps."""
    network = mm.models.conv4(5, width=width, image_shape=(size, size, 3), head_scale=1.0)
    learner = make(network, inner=mm.InnerLoop(optax.sgd(RATE), steps=steps))
    step = learner.make_meta_step(optax.adam(1e-3))
    # shapes stand in for arrays: nothing is run
    labels: Any = jax.ShapeDtypeStruct((1, 25), jnp.int32)
    images: Any = jax.ShapeDtypeStruct((1, 25, size, size, 3), jnp.uint8)
    state = jax.eval_shape(step.init, jax.eval_shape(learner.init, jax.random.key(0)))
    tasks = mm.Task(images, labels, images, labels)
    program: Any = step.compiled
    analysis = program.lower(state, tasks).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 1e6


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--steps", type=int, nargs="+", default=[5, 50])
    options.add_argument("--size", type=int, default=84)
    options.add_argument("--width", type=int, default=32)
    given = options.parse_args()
    heads = " | ".join(f"K = {steps}" for steps in given.steps)
    print(f"MB on {jax.default_backend()}, jax {jax.__version__}\n")
    print(f"| Method | Adapts | {heads} |\n|---|---|{'---:|' * len(given.steps)}")
    for name, (make, adapts) in METHODS.items():
        found = [megabytes(make, steps, given.size, given.width) for steps in given.steps]
        figures = " | ".join(f"{figure:,.0f}" for figure in found)
        print(f"| {name} | {adapts} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

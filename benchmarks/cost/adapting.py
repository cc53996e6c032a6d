"""Where memory grows with the inner steps, and where it does not: by who adapts.

    python -m benchmarks.cost.adapting [--steps 5 50] [--size 84] [--width 32] [--out DIR]

Temporary memory of one compiled meta-step, as the compiler reports it (nothing is run), of one
5-way 5-shot task of RGB images with Conv4. Prints one row a method; writes adapting.json.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import memmeta as mm
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import compiled, temporary_megabytes
from benchmarks.harness.tables import Row, show, write
from memmeta.few_shot.algorithms import Learner, itd_bio

RATE = 0.1
METHODS: dict[str, tuple[Callable[..., Learner], str]] = {
    "maml": (mm.algorithms.maml, "everything"),
    "imaml": (mm.algorithms.imaml, "everything"),
    "itd_bio, features each step": (partial(itd_bio, recompute_features=True), "head"),
    "itd_bio": (itd_bio, "head"),
    "memory_reduced": (mm.algorithms.memory_reduced, "head"),
}
"""Each method, and who adapts."""


def megabytes(make: Callable[..., Learner], steps: int, size: int, width: int) -> float:
    """Temporary memory of one meta-step with `steps` inner steps."""
    network = mm.models.conv4(5, width=width, image_shape=(size, size, 3), head_scale=1.0)
    learner = make(network, inner=mm.InnerLoop(optax.sgd(RATE), steps=steps))
    step = learner.make_meta_step(optax.adam(1e-3))
    labels: Any = jax.ShapeDtypeStruct((1, 25), jnp.int32)
    images: Any = jax.ShapeDtypeStruct((1, 25, size, size, 3), jnp.uint8)
    state = jax.eval_shape(step.init, jax.eval_shape(learner.init, jax.random.key(0)))
    tasks = mm.Task(images, labels, images, labels)
    return temporary_megabytes(compiled(step.compiled, state, tasks))


def main(arguments: list[str] | None = None) -> None:
    """Print the table and write it."""
    parser = make_parser(__doc__, "adapting")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--size", type=int, default=84, help="of the images")
    parser.add_argument("--width", type=int, default=32, help="filters of each block")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for name, (make, adapts) in METHODS.items():
        row: Row = {"method": name, "adapts": adapts}
        for steps in options.steps:
            found = megabytes(make, steps, options.size, options.width)
            row[f"K = {steps}"] = f"{found:,.0f}"
        rows.append(row)
    show(f"MB on {jax.default_backend()}, jax {jax.__version__}", rows)
    write(options.out / "adapting.json", {"rows": rows})


if __name__ == "__main__":
    main()

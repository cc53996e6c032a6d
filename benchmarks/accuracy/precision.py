"""What bfloat16 features with float32 solves cost in accuracy, on glyphs.

    python -m benchmarks.accuracy.precision [--steps N] [--width W] [--episodes N] [--out DIR]

Meta-trains memory_reduced twice from the same start on the same tasks, 5-way 1-shot, with a body
that computes in float32 and in bfloat16 (parameters, statistics, heads, inner loop and linear
solves are float32 in both), and tests both on the same held-out episodes. Writes precision.json.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, show, write
from memmeta.data import Dataset
from memmeta.few_shot.algorithms import memory_reduced
from memmeta.meta import MetaState, confidence_interval

TASKS = 8
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def trained(dtype: Any, options: argparse.Namespace) -> tuple[Row, np.ndarray]:
    """The row of one dtype, and the query loss of every meta-step."""
    network = mm.models.conv4(ways=5, width=options.width, dtype=dtype)
    learner = memory_reduced(network)
    rate = optax.cosine_decay_schedule(3e-3, options.steps)
    step = learner.make_meta_step(optax.adam(rate), task_chunk=1)
    episodes = mm.data.Episodes(ways=5, shots=1, queries=15)
    training, test = (mm.data.load("glyphs", split) for split in ("train", "test"))
    assert isinstance(training, Dataset)
    assert isinstance(test, Dataset)

    @jax.jit
    def run(state: MetaState) -> tuple[MetaState, Array]:
        def body(state: MetaState, key: Array) -> tuple[MetaState, Array]:
            state, metrics = step.update(state, episodes.sample_batch(training, key, TASKS))
            return state, metrics.loss

        return jax.lax.scan(body, state, jax.random.split(jax.random.key(1), options.steps))

    @jax.jit
    def evaluate(state: MetaState) -> Array:
        tasks = episodes.sample_batch(test, jax.random.key(2), options.episodes)
        return learner.evaluate(state.meta_params, tasks, task_chunk=10).aux["accuracy"]

    state, losses = run(step.init(learner.init(jax.random.key(0))))
    interval = confidence_interval(np.asarray(evaluate(state)))
    row: Row = {"features": jnp.dtype(dtype).name, "accuracy %": 100 * interval.mean}
    row |= {"±": 100 * interval.half_width, "last losses": float(losses[-10:].mean())}
    return row, np.asarray(losses)


def main(arguments: list[str] | None = None) -> None:
    """Train both, print, write, draw."""
    parser = make_parser(__doc__, "precision")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=300)
    options = parser.parse_args(arguments)
    rows, losses = [], {}
    for name, dtype in DTYPES.items():
        row, losses[name] = trained(dtype, options)
        rows.append(row)
    title = f"memory_reduced, glyphs, Conv4-{options.width}, {options.steps} meta-steps"
    show(title, rows)
    curves = {name: values.tolist() for name, values in losses.items()}
    write(options.out / "precision.json", {"rows": rows, "losses": curves})


if __name__ == "__main__":
    main()

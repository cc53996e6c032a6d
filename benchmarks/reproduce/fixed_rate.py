"""A constant inner rate along meta-training, as released, beside the default inner loop.

    python -m benchmarks.reproduce.fixed_rate [--iterations N] [--width W]

Every task is worked on by two programs that are equal but for the order of the support images, so
that their answers differ by rounding alone: by how much in the query loss, and in the answer v of
20 CG steps? "2/L" is measured at the head's start, by power iteration. "As released" starts
batch norm's scales from U(0, 1), the others from ones; "default" is the inner loop and the ridge of
`memory_reduced`.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.problems.as_released import STAND_INS, network
from benchmarks.reproduce._data import read, sampler
from memmeta.few_shot.algorithms import Learner
from memmeta.linear_solve import cg, extreme_eigenvalues
from memmeta.models import Network
from memmeta.problem import MetaParams, Task, hessian_product

TASKS, ROWS = 8, 4


def answers(learner: Learner, theta: MetaParams, task: Task) -> tuple[Array, Array, MetaParams]:
    """2/L, the query loss and v of one task."""
    problem = learner.problem
    context = problem.embed(theta, task)
    start = problem.init(theta)
    params = learner.inner(problem, start, context, jax.random.key(0))
    loss, right = jax.value_and_grad(lambda p: problem.outer_loss(p, context)[0])(params)
    first, last = (hessian_product(problem, p, context)[1] for p in (start, params))
    return 2 / extreme_eigenvalues(first, right, 50)[1], loss, cg(20)(last, right).value


def disagreement(learner: Learner, theta: MetaParams, task: Task) -> tuple[Array, Array, Array]:
    """2/L, and the relative differences of the loss and of v under another order of the support."""
    turned = task._replace(
        support_inputs=task.support_inputs[::-1], support_targets=task.support_targets[::-1]
    )
    (edge, loss, v), (_, other, w) = (answers(learner, theta, t) for t in (task, turned))
    change = optax.tree.norm(jax.tree.map(jnp.subtract, v, w)) / optax.tree.norm(v)
    return edge, abs(loss - other) / loss, change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    setting = STAND_INS[0]._replace(width=args.width)
    train, released = read(setting, "train", None), network(setting)
    ones = mm.models.conv4(
        5, width=args.width, image_shape=(setting.side, setting.side, 3), head_scale=1.0
    )

    def learner_of(model: Network, **options: Any) -> Learner:
        start = jax.jit(model.init)(jax.random.key(1))["head"]
        return mm.algorithms.memory_reduced(model, statistics="separate", start=start, **options)

    constant = {"inner": mm.InnerLoop(optax.sgd(setting.inner_rate), steps=20), "ridge": 0.0}
    learners = {
        "as released": learner_of(released, **constant),
        "scales of one": learner_of(ones, **constant),
        "default": learner_of(ones),
    }
    print("inner loop     meta-step    2/L   its rate   |Δf|/f   ‖Δv‖/‖v‖   accuracy")
    for name, learner in learners.items():
        step = learner.make_meta_step(optax.adam(setting.outer_rate), guard=None)
        compare = jax.jit(jax.vmap(disagreement, (None, None, 0)), static_argnums=0)
        state = step.init(jax.jit(learner.init)(jax.random.key(0)))
        for number in range(args.iterations + 1):
            key = jax.random.fold_in(jax.random.key(1), number)
            tasks = sampler(train).sample_batch(train, key, TASKS)
            shown = number % (args.iterations // ROWS) == 0
            found = compare(learner, state.meta_params, tasks) if shown else ()
            state, metrics = step(state, tasks)
            if shown:
                edge, loss, v = (float(jnp.median(x)) for x in found)
                rate = f"{setting.inner_rate:g}" if name != "default" else "≤ 1/L"
                accuracy = 100 * float(metrics.aux["accuracy"])
                numbers = f"{edge:>8.3f} {rate:>8} {loss:>10.1e} {v:>9.1e} {accuracy:>9.1f} %"
                print(f"{name:<13} {number:>9} {numbers}", flush=True)


if __name__ == "__main__":
    main()

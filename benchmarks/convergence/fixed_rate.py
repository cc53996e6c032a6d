"""A fixed inner rate against the default as meta-training makes the features grow, on glyphs.

    python -m benchmarks.convergence.fixed_rate [--steps N] [--width W] [--out DIR]

First table: features multiplied by a scale, and what is then left of the head's solution and of the
hypergradient. Second table and picture: the same two inner loops along meta-training with Adam.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.harness import pictures
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, show, write
from benchmarks.problems.glyphs import features, glyph_tasks
from memmeta.few_shot import HeadContext, head_problem, softmax_problem
from memmeta.hypergradient import implicit
from memmeta.inner import newton
from memmeta.linear_solve import cg

RIDGE, RATE, STEPS = 0.1, 0.5, 50
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
TASKS = 8
LOOPS = {
    f"fixed rate {RATE:g}": mm.InnerLoop(optax.sgd(RATE), steps=STEPS),
    "default": mm.InnerLoop(steps=STEPS),
}
REFERENCE = mm.InnerLoop(newton(cg(60)), steps=30)


def scaled(network: Any, theta: Any, tasks: Any) -> list[Row]:
    """Of both loops on features × a scale: ‖∇_φ g‖, accuracy, the hypergradient's error."""
    problem = head_problem(network, RIDGE, learn_start=False)

    def embed(features: tuple[Array, Array], task: Any) -> HeadContext:
        return HeadContext(features[0], task.support_targets, features[1], task.query_targets)

    heads = softmax_problem(embed, lambda features: problem.init(theta), RIDGE)

    def one(task: Any, scale: Array) -> tuple[Array, dict[str, dict[str, Array]]]:
        context = problem.embed(theta, task)
        features = (scale * context.support_features, scale * context.query_features)
        exact, _ = answer(heads, REFERENCE, 200, features, task)
        rows = {}
        for name, loop in LOOPS.items():
            gradient, metrics = answer(heads, loop, 20, features, task)
            error = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, exact)) / optax.tree.norm(
                exact
            )
            gradient_norm, accuracy = metrics.report.inner_gradient_norm, metrics.aux["accuracy"]
            rows[name] = {"‖∇_φ g‖": gradient_norm, "accuracy": accuracy, "error of ∇F": error}
        return smoothness(heads, embed(features, task)), rows

    everywhere = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))
    bounds, rows = everywhere(tasks, jnp.array(SCALES))
    table = []
    for i, scale in enumerate(SCALES):
        for name, columns in rows.items():
            beyond = 0.5 if name == "default" else RATE * float(np.median(bounds[i])) / 2
            row = {"features ×": scale, "inner loop": name, "rate / (2/L)": beyond}
            table.append(row | {n: float(np.mean(x[i])) for n, x in columns.items()})
    return table


def answer(
    problem: mm.Problem, loop: mm.InnerLoop, cg_steps: int, theta: Any, task: Any
) -> tuple[Any, mm.Metrics]:
    """The hypergradient of one task, and what was measured beside it."""
    step = mm.make_meta_step(problem, loop, implicit(cg(cg_steps)), optax.identity())
    return step.gradient(step.init(theta), jax.tree.map(lambda leaf: leaf[None], task))


def smoothness(problem: mm.Problem, context: Any) -> Array:
    """The bound L on the inner Hessian that the problem brings."""
    assert problem.smoothness is not None
    return problem.smoothness(context)


def along(network: Any, loop: mm.InnerLoop, steps: int) -> dict[str, list[float]]:
    """Meta-training with Adam: accuracy, ‖∇_φ g‖ and RATE over 2/L, of every meta-step."""
    problem = head_problem(network, RIDGE, learn_start=False)
    step = mm.make_meta_step(problem, loop, implicit(cg(20)), optax.adam(3e-3))
    state = step.init({"body": network.init(jax.random.key(0))["body"]})

    @jax.jit
    def edge(theta: Any, tasks: Any) -> Array:
        bounds = jax.vmap(lambda task: smoothness(problem, problem.embed(theta, task)))(tasks)
        return RATE * jnp.median(bounds) / 2

    names = ("accuracy", "‖∇_φ g‖", f"{RATE:g} / (2/L)")
    found: dict[str, list[float]] = {name: [] for name in names}
    for k in range(steps):
        tasks = glyph_tasks(jax.random.key(100 + k), TASKS)
        beyond = edge(state.meta_params, tasks)
        state, metrics = step(state, tasks)
        values = (metrics.aux["accuracy"], metrics.report.inner_gradient_norm, beyond)
        for name, value in zip(names, values, strict=True):
            found[name].append(float(value))
    return found


def summary(name: str, curves: dict[str, list[float]]) -> list[Row]:
    """A row for every eighth of the run: its mean."""
    count = min(8, len(curves["accuracy"]))
    parts = {column: np.array_split(np.array(y), count) for column, y in curves.items()}
    ends = np.cumsum([len(part) for part in parts["accuracy"]])
    return [
        {"inner loop": name, "to meta-step": float(end)}
        | {column: float(np.mean(split[i])) for column, split in parts.items()}
        for i, end in enumerate(ends)
    ]


def picture(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel a figure, one curve a loop, smoothed over 20 meta-steps."""
    names = list(next(iter(runs.values())))
    with pictures.panels(path, len(names), columns=len(names), size=(5, 3.6)) as axes:
        for panel, name in zip(axes, names, strict=True):
            for loop, curves in runs.items():
                window = np.ones(min(20, len(curves[name])))
                panel.plot(np.convolve(curves[name], window / window.size, "valid"), label=loop)
            panel.set(title=name, xlabel="meta-steps")
            if name != "accuracy":
                panel.set(yscale="log")
        axes[0].legend()
        axes[-1].axhline(1, color="grey", linestyle=":")


def main(arguments: list[str] | None = None) -> None:
    """Print both tables, write fixed_rate.json and fixed_rate.png."""
    parser = make_parser(__doc__, "fixed_rate")
    parser.add_argument("--steps", type=int, default=240, help="of meta-training")
    parser.add_argument("--width", type=int, default=16, help="filters of each block")
    options = parser.parse_args(arguments)
    network, theta = features(options.width)
    by_scale = scaled(network, theta, glyph_tasks(jax.random.key(1), TASKS))
    show(f"Features × a scale, ridge {RIDGE:g}, {STEPS} inner steps", by_scale)
    runs = {name: along(network, loop, options.steps) for name, loop in LOOPS.items()}
    rows = [row for name, curves in runs.items() for row in summary(name, curves)]
    show(f"Meta-training with Adam, {TASKS} tasks a step", rows)
    write(options.out / "fixed_rate.json", {"scaled": by_scale, "runs": runs})
    picture(runs, options.out / "fixed_rate.png")


if __name__ == "__main__":
    main()

"""What happens without strong convexity, on real glyph features.

    python -m benchmarks.ridge [--steps N] [--width W] [--out DIR]

First table: the linear system of the head at a random network, for several ridges. Second table:
short meta-training with gradient descent and with Adam outside, for ridge 0 (as released) and
ridge 0.1.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array

import memmeta as mm
from memmeta import trees
from memmeta.data import Dataset
from memmeta.few_shot import head_problem
from memmeta.hypergradient import implicit
from memmeta.linear_solve import cg, extreme_eigenvalues

RIDGES = (0.0, 1e-3, 1e-2, 1e-1)
TASKS = 4


@cache
def _sampler() -> Callable[[Array, int], Any]:
    dataset = mm.data.load("glyphs", "train")
    assert isinstance(dataset, Dataset)
    episodes = mm.data.Episodes(ways=5, shots=1, queries=5)
    sample = jax.jit(episodes.sample_batch, static_argnums=2)
    return lambda key, count: sample(dataset, key, count)


def glyph_tasks(key: Array, count: int) -> Any:
    """5-way 1-shot tasks of the training scripts."""
    return _sampler()(key, count)


def system(network: Any, theta: Any, tasks: Any, ridge: float) -> dict[str, float]:
    """The linear system [∂²g] v = ∂f of the heads: curvatures, and what CG makes of it."""
    problem = head_problem(network, ridge, learn_start=False)

    def one(task: Any) -> tuple:
        context = problem.embed(theta, task)
        params = mm.InnerLoop(steps=50)(problem, problem.init(theta), context)
        _, product = jax.linearize(lambda p: jax.grad(problem.inner_loss)(p, context), params)
        outer = jax.grad(lambda p: problem.outer_loss(p, context)[0])(params)
        ends = extreme_eigenvalues(product, outer, 40)
        few, many = cg(20)(product, outer), cg(100)(product, outer)
        return *ends, trees.norm(few.value), trees.norm(many.value), few.residual, many.residual

    names = ("smallest curvature", "largest", "‖v‖ CG 20", "‖v‖ CG 100", "residual 20", "100")
    found = jax.jit(jax.vmap(one))(tasks)
    row = {n: float(np.median(x)) for n, x in zip(names, found, strict=True)}
    row["smallest curvature"] = float(np.min(found[0]))
    return {"ridge": ridge, **row}


def training(network: Any, ridge: float, outer: str, steps: int) -> dict[str, Any]:
    """A short meta-training: query loss at its start and end, and the length of the gradient."""
    optimizer = {"SGD": optax.sgd(0.1), "Adam": optax.adam(3e-3)}[outer]
    problem = head_problem(network, ridge, learn_start=False)
    step = mm.make_meta_step(problem, mm.InnerLoop(steps=50), implicit(cg(20)), optimizer)
    state = step.init({"body": network.init(jax.random.key(0))["body"]})
    losses, norms = [], []
    for k in range(steps):
        state, metrics = step(state, glyph_tasks(jax.random.key(100 + k), TASKS))
        losses.append(float(metrics.loss))
        norms.append(float(metrics.gradient_norm))
    window = max(1, steps // 5)
    return {
        "outer": outer,
        "ridge": ridge,
        "query loss, first": float(np.mean(losses[:window])),
        "last": float(np.mean(losses[-window:])),
        "largest ‖∇F‖": float(np.max(norms)),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table, one line a row."""
    names = list(rows[0])
    width = [max(len(name), 9) for name in names]
    print(title, flush=True)
    print("  ".join(f"{name:>{w}}" for name, w in zip(names, width, strict=True)))
    for row in rows:
        cells = (v if isinstance(v, str) else f"{v:.3g}" for v in row.values())
        print("  ".join(f"{cell:>{w}}" for cell, w in zip(cells, width, strict=True)))


def main(arguments: list[str] | None = None) -> None:
    """Print both tables and write ridge.json."""
    parser = argparse.ArgumentParser(description="Ridge 0 against ridge > 0 on glyph features.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("build/ridge"))
    options = parser.parse_args(arguments)
    network = mm.models.conv4(ways=5, width=options.width)
    theta = {"body": network.init(jax.random.key(0))["body"]}
    tasks = glyph_tasks(jax.random.key(1), 2 * TASKS)
    tables = {}

    def add(title: str, rows: list[dict[str, Any]]) -> None:
        tables[title] = rows
        show(title, rows)

    add("The head's linear system", [system(network, theta, tasks, r) for r in RIDGES])
    runs = [(outer, ridge) for outer in ("SGD", "Adam") for ridge in (0.0, 0.1)]
    trained = [training(network, ridge, outer, options.steps) for outer, ridge in runs]
    add(f"Meta-training, {options.steps} steps", trained)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ridge.json").write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()

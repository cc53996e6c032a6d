"""What happens without strong convexity, on real glyph features.

    python -m benchmarks.convergence.ridge [--steps N] [--width W] [--out DIR]

First table: the linear system of the head at a random network, for several ridges. Second table:
short meta-training with gradient descent and with Adam outside, for ridge 0 (as released) and
ridge 0.1.
"""

from typing import Any

import jax
import numpy as np
import optax

import memmeta as mm
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, show, write
from benchmarks.problems.glyphs import features, glyph_tasks
from memmeta.few_shot import head_problem
from memmeta.hypergradient import implicit
from memmeta.linear_solve import cg, extreme_eigenvalues

RIDGES = (0.0, 1e-3, 1e-2, 1e-1)
TASKS = 4


def system(network: Any, theta: Any, tasks: Any, ridge: float) -> Row:
    """The linear system [∂²g] v = ∂f of the heads: curvatures, and what CG makes of it."""
    problem = head_problem(network, ridge, learn_start=False)

    def one(task: Any) -> tuple:
        context = problem.embed(theta, task)
        params = mm.InnerLoop(steps=50)(problem, problem.init(theta), context)
        _, product = jax.linearize(lambda p: jax.grad(problem.inner_loss)(p, context), params)
        outer = jax.grad(lambda p: problem.outer_loss(p, context)[0])(params)
        ends = extreme_eigenvalues(product, outer, 40)
        few, many = cg(20)(product, outer), cg(100)(product, outer)
        return (
            *ends,
            optax.tree.norm(few.value),
            optax.tree.norm(many.value),
            few.residual,
            many.residual,
        )

    names = ("smallest curvature", "largest", "‖v‖ CG 20", "‖v‖ CG 100", "residual 20", "100")
    found = jax.jit(jax.vmap(one))(tasks)
    row = {n: float(np.median(x)) for n, x in zip(names, found, strict=True)}
    row["smallest curvature"] = float(np.min(found[0]))
    return {"ridge": ridge, **row}


def training(network: Any, ridge: float, outer: str, steps: int) -> Row:
    """A short meta-training: query loss at its start and end, and the norm of the gradient."""
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


def main(arguments: list[str] | None = None) -> None:
    """Print both tables and write ridge.json."""
    parser = make_parser(__doc__, "ridge")
    parser.add_argument("--steps", type=int, default=40, help="of meta-training")
    parser.add_argument("--width", type=int, default=8, help="filters of each block")
    options = parser.parse_args(arguments)
    network, theta = features(options.width)
    tasks = glyph_tasks(jax.random.key(1), 2 * TASKS)
    systems = [system(network, theta, tasks, ridge) for ridge in RIDGES]
    show("The head's linear system", systems)
    runs = [(outer, ridge) for outer in ("SGD", "Adam") for ridge in (0.0, 0.1)]
    trained = [training(network, ridge, outer, options.steps) for outer, ridge in runs]
    show(f"Meta-training, {options.steps} steps", trained)
    write(options.out / "ridge.json", {"systems": systems, "training": trained})


if __name__ == "__main__":
    main()

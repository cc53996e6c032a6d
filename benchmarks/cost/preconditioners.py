"""Products that conjugate gradients need to a residual of 1e-4, by preconditioner.

    python -m benchmarks.cost.preconditioners [--tolerance 1e-4] [--out DIR]

Systems of implicit hypergradients: iMAML's on a batch-normalised Conv4 with glyphs, a network of
dense layers with a proximal term of 0.1 and of 0.001, and a softmax head of condition number 10⁴.
Those of networks are of the Gauss-Newton matrix: their Hessians are indefinite. A preconditioner's
own products count, and its time too. Prints one row a system and preconditioner; writes
preconditioners.json.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import memmeta as mm
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, show, write
from benchmarks.harness.timing import in_turn
from benchmarks.problems.glyphs import glyph_tasks
from memmeta.few_shot import HeadContext, softmax_problem
from memmeta.linear_solve import (
    LinearSolver,
    Preconditioner,
    cg,
    jacobi,
    kronecker,
    nystrom,
    woodbury,
)
from memmeta.problem import Params, Problem, Task, gauss_newton_product, hessian_product

STEPS = 2000
CONV4_PROXIMAL, CONDITION = 2.0, 1e4
PRECONDITIONERS: dict[str, Preconditioner | None] = {
    "none": None,
    "diagonal": jacobi(),
    "Nyström, rank 20": nystrom(20),
    "Nyström, rank 50": nystrom(50),
    "Kronecker": kronecker(),
}


class LinearSystem(NamedTuple):
    """A linear system at the end of an inner loop."""

    problem: Problem
    params: Params
    context: Any
    gauss_newton: bool

    def solve(self, solver: LinearSolver) -> Any:
        """v of the implicit rule."""
        where = self.problem, self.params, self.context
        product = gauss_newton_product(*where) if self.gauss_newton else hessian_product(*where)[1]
        b = jax.grad(lambda phi: self.problem.outer_loss(phi, self.context)[0])(self.params)
        named = {"problem": self.problem, "params": self.params, "context": self.context}
        return solver(product, b, **named)


def conv4() -> LinearSystem:
    """iMAML's system on the first task of the glyphs, after 16 inner steps."""
    network = mm.models.conv4(ways=5, width=32, head_scale=1.0)
    task = jax.tree.map(lambda x: x[0], glyph_tasks(jax.random.key(0), 1))
    learner = mm.algorithms.imaml(network, proximal=CONV4_PROXIMAL)
    return _adapted(learner, task)


def dense(proximal: float) -> LinearSystem:
    """A network of dense layers of 784-128-64-5 on the same task."""
    network = mm.models.mlp(5, (128, 64), input_shape=(28, 28, 1))
    task = jax.tree.map(lambda x: x[0], glyph_tasks(jax.random.key(0), 1))
    return _adapted(mm.algorithms.imaml(network, proximal=proximal), task)


def _adapted(learner: Any, task: Task) -> LinearSystem:
    theta = learner.init(jax.random.key(1))
    context = learner.problem.embed(theta, task)
    params = jax.jit(partial(learner.inner, learner.problem))(learner.problem.init(theta), context)
    return LinearSystem(learner.problem, params, context, gauss_newton=True)


def head() -> LinearSystem:
    """A softmax head on 64 features whose scales fall off; the ridge gives the condition number."""
    ways, count, width = 5, 200, 64
    keys = jax.random.split(jax.random.key(2), 3)
    scales = jnp.geomspace(1.0, 1e-2, width)
    targets = jnp.arange(count) % ways
    centres = jax.random.normal(keys[0], (ways, width))
    draw = lambda key: scales * (centres[targets] + jax.random.normal(key, (count, width)))  # noqa: E731
    context = HeadContext(draw(keys[1]), targets, draw(keys[2]), targets)
    zeros = {"kernel": jnp.zeros((width, ways)), "bias": jnp.zeros(ways)}
    make = lambda ridge: softmax_problem(lambda t, c: c, lambda t: zeros, ridge)  # noqa: E731
    smoothness = make(0.0).smoothness
    assert smoothness is not None  # for the type checker: heads have one
    problem = make(float(smoothness(context)) / CONDITION)
    inner = mm.InnerLoop(mm.inner.newton(None), 20)
    return LinearSystem(problem, inner(problem, zeros, context), context, gauss_newton=False)


SYSTEMS: dict[str, Callable[[], LinearSystem]] = {
    "conv4": conv4,
    "dense-0.1": partial(dense, 0.1),
    "dense-0.001": partial(dense, 0.001),
    "head": head,
}


def measure(name: str, tolerance: float, repeats: int, cpu_time: bool) -> list[Row]:
    """One row a preconditioner, timed in turn."""
    system = SYSTEMS[name]()
    calls, found = {}, {}
    solvers = {
        label: cg(STEPS, tolerance=tolerance, preconditioner=preconditioner)
        for label, preconditioner in PRECONDITIONERS.items()
    }
    if system.problem.structure.head is not None:
        solvers["Woodbury, no iteration"] = woodbury()
    for label, solver in solvers.items():
        solve = jax.jit(partial(system.solve, solver))
        found[label] = jax.block_until_ready(solve())
        calls[label] = lambda solve=solve: jax.block_until_ready(solve())
    seconds = in_turn(calls, repeats, cpu_time)
    least = {label: float(np.min(each)) for label, each in seconds.items()}
    size = sum(leaf.size for leaf in jax.tree.leaves(system.params))
    return [
        {
            "system": f"{name}, {size:,} parameters",
            "preconditioner": label,
            "residual": float(each.residual),
            "iterations": int(each.iterations),
            "products": int(each.products),
            "fewer": int(found["none"].products) / int(each.products),
            "ms": 1e3 * least[label],
            "faster": least["none"] / least[label],
        }
        for label, each in found.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables and write them."""
    parser = make_parser(__doc__, "preconditioners", repeats=5)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of ‖b − A v‖ / ‖b‖")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for name in options.systems:
        found = measure(name, options.tolerance, options.repeats, options.cpu_time)
        show(f"{name}, on {jax.default_backend()}", found)
        rows += found
    write(options.out / "preconditioners.json", {"rows": rows})


if __name__ == "__main__":
    main()

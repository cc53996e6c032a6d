"""What accuracy on demand costs, beside the best fixed numbers of steps.

    python -m benchmarks.cost.on_demand [--quick] [--only NAME ...] [--out DIR]

For each problem, inner solver and tolerance, in float64 and in θ: the relative error that
`implicit(tolerance=...)` leaves of the hypergradient of the worst of 4 tasks ("task") and of their
sum ("∇F"); the inner steps of the mean task, its rounds, and its cost. Beside it the best fixed
pair in hindsight: of all K inner steps and m steps of conjugate gradients from zero whose errors,
of the worst task and of ∇F, are no larger, the one of the smallest cost. "ratio" is the one cost
over the other, "slowest" that of the slowest task.

Cost is the number of derivatives: gradients of g and f, Hessian-vector products and mixed products
∂²_cφ g v, those of the solvers' checks and of error estimates included.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

import memmeta as mm
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, aim, show, write
from benchmarks.problems.head_and_network import Example, heads, networks
from benchmarks.problems.quadratic import Family
from benchmarks.problems.softmax import Heads
from memmeta.hypergradient import Chunk, implicit
from memmeta.linear_solve import cg, direct

TOLERANCES = (1e-1, 1e-2, 1e-3)
SOLVERS: dict[str, Callable[[], Any]] = {
    "descent": mm.inner.gradient_descent,
    "accelerated": mm.inner.accelerated,
}
MOST, REFERENCE = 2000, 5000
"""Inner steps on demand, and of the reference, at most."""
SOLVE_STEPS = (*range(3, 13), 14, 16, 18, 20, 24, 28)
"""Steps m of conjugate gradients that are tried."""
FIXED, ROUND = 4, 3
"""Derivatives beside K + m of a fixed pair: ∂f, the residual of the solve, the mixed product and
∇_φ g, about which g is linearised. Of a round beside those that the report counts: two of f, and
∇_φ g."""


def quadratics() -> Example:
    """Quadratics in 40 dimensions, of condition number 20."""
    family = Family(jnp.linspace(1.0, 20.0, 40), jnp.ones(40))
    return Example(family.problem(), jnp.ones(40), family.sample(jax.random.key(0), 4))


def softmax() -> Example:
    """Softmax heads of 15 numbers on linear features."""
    found = Heads()
    key = jax.random.key(0)
    return Example(found.problem(), found.start(key), found.sample(key, 4))


PROBLEMS: dict[str, Callable[[], Example]] = {
    "head": heads,
    "network": networks,
    "quadratic": quadratics,
    "softmax": softmax,
}


def wide(tree: Any) -> Any:
    """All floating-point numbers in float64."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
    )


def flat(tree: Any) -> Array:
    """All numbers of a tree as one vector."""
    return ravel_pytree(tree)[0]


def alone(tasks: Any) -> list[Any]:
    """Each task as a batch of its own."""
    count = jax.tree.leaves(tasks)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i : i + 1], tasks) for i in range(count)]


def steps_from_zero(count: Array) -> mm.linear_solve.LinearSolver:
    """So many steps of conjugate gradients, a traced number."""

    def solve(product: Callable[[Any], Any], b: Any, **_: Any) -> mm.linear_solve.LinearSolution:
        r, unravel = ravel_pytree(b)

        def step(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, r, p = carry
            image = flat(product(unravel(p)))
            quadratic = p @ image
            usable = quadratic > 0  # else the answer stays
            rate = jnp.where(usable, r @ r / jnp.where(usable, quadratic, 1), 0)
            following = r - rate * image
            share = following @ following / jnp.where(r @ r > 0, r @ r, 1)
            return x + rate * p, following, jnp.where(usable, following + share * p, p)

        x, r, _p = jax.lax.fori_loop(0, count, step, (0 * r, r, r))
        return mm.linear_solve.LinearSolution(unravel(x), r @ r, jnp.inf + 0 * x[0], count)

    return solve


def fixed_gradients(example: Example, solver: Any, steps: np.ndarray, task: Any) -> Array:
    """∇̂F_i in θ of one task, at all numbers of inner steps and of conjugate gradients."""
    problem, theta = example.problem, example.theta
    inner = mm.InnerLoop(solver, 0)
    context = problem.embed(theta, jax.tree.map(lambda x: x[0], task))

    def path(state: Any, _: None) -> tuple[Any, Any]:
        return inner.advance(problem, state, context, jax.random.key(0), 1), state.params

    begin = inner.start(problem, problem.init(theta), context)
    _, params = jax.lax.scan(path, begin, length=int(steps[-1]) + 1)

    def at(params: Any) -> Array:
        there = replace(problem, init=lambda theta: params)

        def gradient(count: Array) -> Array:
            estimator = implicit(steps_from_zero(count), estimate_error=False)
            return flat(estimator(there, inner, theta, Chunk.of(task)).gradient)

        return jax.vmap(gradient)(jnp.array(SOLVE_STEPS))

    return jax.lax.map(at, jax.tree.map(lambda x: x[steps], params))


class Demanded:
    """`implicit(tolerance=...)` on one task at a time, compiled, with all that it costs."""

    def __init__(self, example: Example, solver: Any, most: int) -> None:
        self.rounds = 0
        inner = mm.InnerLoop(solver, most)
        early = cg(100, tolerance=0.0, absolute_tolerance=1.0)  # the default, counted

        def solve(*system: Any, **where: Any) -> mm.linear_solve.LinearSolution:
            jax.debug.callback(self.count)
            return early(*system, **where)

        def call(task: Any, tolerance: Array) -> tuple[Array, Any]:
            estimator = implicit(solve, tolerance=tolerance)
            found = estimator(example.problem, inner, example.theta, Chunk.of(task))
            return flat(found.gradient), found.report

        self.call = jax.jit(call)

    def count(self) -> None:
        """One more round."""
        self.rounds += 1

    def __call__(self, task: Any, tolerance: float) -> tuple[np.ndarray, int, int, int]:
        """The gradient, and the inner steps, rounds and derivatives made for it."""
        self.rounds = 0
        gradient, report = jax.block_until_ready(self.call(task, jnp.asarray(tolerance)))
        jax.effects_barrier()
        steps = int(report.inner_steps[0])
        cost = 1 + steps + int(report.linear_iterations[0]) + ROUND * self.rounds
        return np.asarray(gradient), steps, self.rounds, cost


def errors(found: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of gradients [tasks, ..., θ]: the relative error of the worst task, and of the sum."""
    norm = np.linalg.norm
    shape = (len(exact),) + (1,) * (found.ndim - 2)
    each = norm(found.T - exact.T.reshape(-1, *shape[::-1]), axis=0).T
    each = each / norm(exact, axis=1).reshape(shape)
    total = norm(found.sum(0) - exact.sum(0), axis=-1) / norm(exact.sum(0))
    return each.max(0), total


def measured(name: str, solver: str, tolerances: tuple[float, ...], most: int) -> list[Row]:
    """One problem and one inner solver at all tolerances."""
    example = PROBLEMS[name]()
    example = Example(example.problem, *wide((example.theta, example.tasks)))
    tasks, make = alone(example.tasks), SOLVERS[solver]
    reference = mm.InnerLoop(mm.inner.gradient_descent(), REFERENCE)

    @jax.jit
    def solution(task: Any) -> Array:
        chunk = Chunk.of(task)
        return flat(implicit(direct())(example.problem, reference, example.theta, chunk).gradient)

    exact = np.stack([solution(task) for task in tasks])
    demanded = Demanded(example, make(), most)
    found = {t: [demanded(task, t) for task in tasks] for t in tolerances}
    longest = max(steps for calls in found.values() for _, steps, _, _ in calls)
    # every number at first, then every 4 %
    counts = np.unique(
        np.round(np.r_[0:40, np.geomspace(40, max(41, longest) + 1, 60)]).astype(int)
    )
    fixed = jax.jit(lambda task: fixed_gradients(example, make(), counts, task))
    worst, total = errors(np.stack([fixed(task) for task in tasks]), exact)
    cost_of_pair = counts[:, None] + np.array(SOLVE_STEPS) + FIXED

    rows = []
    for tolerance, calls in found.items():
        of_task, of_sum = errors(np.stack([call[0] for call in calls]), exact)
        steps, rounds, cost = np.array([call[1:] for call in calls]).T
        good = (worst <= of_task) & (total <= of_sum)
        pair = np.unravel_index(np.argmin(np.where(good, cost_of_pair, np.inf)), good.shape)
        best = int(cost_of_pair[pair]) if good.any() else np.nan
        rows.append(
            {"problem": name, "inner": solver, "tolerance": tolerance}
            | {"task": float(of_task), "∇F": float(of_sum)}
            | {"K": float(steps.mean()), "rounds": float(rounds.mean()), "cost": float(cost.mean())}
            | {"best K": int(counts[pair[0]]), "m": SOLVE_STEPS[pair[1]], "its cost": best}
            | {"ratio": float(cost.mean() / best), "slowest": float(cost.max() / best)}
        )
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure and print; returns the rows."""
    parser = make_parser(__doc__, "on_demand", quick="the small problems, one tolerance")
    parser.add_argument("--only", nargs="+", choices=PROBLEMS, help="problems")
    options = parser.parse_args(arguments)
    names = options.only or (["quadratic"] if options.quick else list(PROBLEMS))
    tolerances = TOLERANCES[:1] if options.quick else TOLERANCES
    rows: list[Row] = []
    with jax.enable_x64(True):
        for name in names:
            found = [row for solver in SOLVERS for row in measured(name, solver, tolerances, MOST)]
            show(name, found)
            rows += found
    most = max(max(row["task"], row["∇F"]) / row["tolerance"] for row in rows)
    ratio = max(row["ratio"] for row in rows)
    aims = [
        aim("largest true relative error, over its tolerance", "≤ 1", most, most <= 1),
        aim("largest ratio of costs", "≤ 1.3", ratio, ratio <= 1.3),
    ]
    show("aims", aims)
    write(options.out / "on_demand.json", {"rows": rows, "aims": aims})
    return rows


if __name__ == "__main__":
    main()

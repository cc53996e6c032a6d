"""Solvers of the public benchmark of stochastic bilevel methods, from a clone that the user made.

    git clone https://github.com/benchopt/benchmark_bilevel && pip install benchopt

They are driven by what that benchmark itself calls: `set_objective`, `init` and the compiled
`one_epoch`. Their rates are set in the state that `init` returns, so that they do not decay.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.bilevel.by_hand import Rates
from benchmarks.bilevel.problems import Context, Example
from benchmarks.bilevel.recipes import STEPS
from benchmarks.bilevel.runs import Run, samples_of


class Solver(NamedTuple):
    """One of them, and how it is set.

    Attributes:
        name: its own; that of its file in lower case.
        cost: gradients and products of one step.
        rates: ours -> its, in the order of its `state_lr`.
        given: its own parameters.
        start: ours -> more entries of its first state.
    """

    name: str
    cost: int
    rates: Callable[[Rates], tuple[float, ...]]
    given: dict[str, Any] = {}  # noqa: RUF012
    start: Callable[[Rates], dict[str, Any]] = lambda rates: {}


SOLVERS = {
    "soba": Solver("SOBA", 4, lambda r: (r.inner, r.outer)),
    "saba": Solver("SABA", 4, lambda r: (r.inner, r.outer)),
    "amigo": Solver(
        "AmIGO", 2 * STEPS + 2, lambda r: (r.inner, r.linear, r.outer), {"n_inner_steps": STEPS}
    ),
    # Theirs descends f + λ g, ours g + δ f with δ = 1/λ: its rate is δ times ours. λ stays.
    "f2sa, p = 1": Solver(
        "F2SA",
        6,
        lambda r: (r.delta * r.inner, r.inner, r.outer, 0.0),
        {"n_inner_steps": 1},
        lambda r: {"lmbda": jnp.float32(1 / r.delta)},
    ),
}
"""By the recipe that is the same algorithm; one rate there is that of φ and of v."""


class NotThere(Exception):
    """Something that the user has to install or clone; the message says what."""


def check(folder: Path) -> None:
    """Whether the solvers can be loaded.

    Raises:
        NotThere: benchopt is not installed, or the folder is not a clone.
    """
    if not (folder / "solvers").is_dir() or not (folder / "benchmark_utils").is_dir():
        raise NotThere(
            f"{folder} is no clone of it (git clone https://github.com/benchopt/benchmark_bilevel)"
        )
    if find_spec("benchopt") is None:
        raise NotThere("benchopt is not installed (pip install benchopt)")


def solver_run(folder: Path, name: str, example: Example, rates: Rates, rows: int) -> Run:
    """One of `SOLVERS` on a problem, with its own order of blocks."""
    chosen = SOLVERS[name]
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # its modules import each other by `benchmark_utils`
    module = importlib.import_module(f"solvers.{chosen.name.lower()}")
    solver = module.Solver.get_instance(batch_size=rows, **chosen.given)
    samples = samples_of(example)
    phi = example.problem.init(example.theta)
    solver.set_objective(*losses(example), samples, samples, phi, example.theta)

    def start() -> tuple[Any, ...]:
        first = solver.init()
        # SABA's stored directions come first, and apart from the rest
        *table, carry = first if isinstance(first, tuple) else (first,)
        constants = jnp.asarray(chosen.rates(rates), jnp.float32)
        lasting = {"constants": constants, "exponents": jnp.zeros_like(constants)}
        return *table, carry | {"state_lr": carry["state_lr"] | lasting} | chosen.start(rates)

    def advance(state: tuple[Any, ...], steps: int) -> tuple[Any, ...]:
        found = jax.block_until_ready(solver.one_epoch(*reversed(state), steps))
        return found if isinstance(found, tuple) else (found,)

    return Run(chosen.cost, start, advance, theta=lambda state: state[-1]["outer_var"])


def losses(example: Example) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """g and f as they take them: of φ, θ, and the first row and the size of a block."""
    train, validation = example.data

    def cut(part: Any, start: Array, rows: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), part)

    def inner(phi: Array, theta: Array, start: Array, batch_size: int) -> Array:
        seen = Context(theta, cut(train, start, batch_size), None)
        return example.problem.inner_loss(phi, seen)

    def outer(phi: Array, theta: Array, start: Array, batch_size: int) -> Array:
        seen = Context(theta, None, cut(validation, start, batch_size))
        return example.problem.outer_loss(phi, seen)[0]

    return inner, outer

"""A step of SOBA on a block beside an exact hypergradient on all rows, timed in turn."""

import argparse

import jax
import numpy as np
import optax

import memmeta as mm
from benchmarks.bilevel.by_hand import Rates
from benchmarks.bilevel.problems import Example
from benchmarks.bilevel.recipes import first_state, one_task, step_of, view_of
from benchmarks.harness.tables import Row
from benchmarks.harness.timing import in_turn
from memmeta.inner import newton
from memmeta.linear_solve import cg

SAMPLES, PRODUCTS, LEAST = 20_000, 20, 50
"""Of each set; products of the exact hypergradient's linear solve; how much more it shall cost."""


def beside_exact(example: Example, rates: Rates, rows: int, options: argparse.Namespace) -> Row:
    """Microseconds of each, and how many steps one exact hypergradient costs.

    The exact one is taken at a φ that is solved for before the clock starts, so that it is the
    linear solve, by conjugate gradients on all rows, and the products around it.
    """
    step = step_of("soba", example, view_of("soba", rows), rates)
    begin, tasks = first_state(step, example, jax.random.key(0)), one_task(example.data)
    steps = 20 if options.quick else 2000

    @jax.jit
    def soba(data: object) -> object:
        body = lambda state, _: (step.update(state, data)[0], None)  # noqa: E731
        return jax.lax.scan(body, begin, length=steps)[0]

    problem = example.problem
    context = problem.embed(example.theta, example.data)
    start = problem.init(example.theta)
    solved = jax.block_until_ready(mm.InnerLoop(newton(None), 12)(problem, start, context))
    at_solution = mm.Problem(
        problem.embed, problem.inner_loss, problem.outer_loss, lambda theta: solved
    )
    estimator = mm.hypergradient.implicit(cg(PRODUCTS), estimate_error=False)
    no_step = mm.InnerLoop(optax.sgd(rates.inner), 0)
    exact = mm.make_meta_step(at_solution, no_step, estimator, optax.identity())
    state = exact.init(example.theta)
    gradient = jax.jit(lambda data: exact.gradient(state, data)[0])
    calls = {
        "soba": lambda: jax.block_until_ready(soba(tasks)),
        "exact": lambda: jax.block_until_ready(gradient(tasks)),
    }
    for call in calls.values():
        call()
    seconds = in_turn(calls, options.repeats, options.cpu_time)
    soba_step = seconds["soba"] / steps
    return {
        "SOBA step, µs": 1e6 * float(np.median(soba_step)),
        "exact by CG, µs": 1e6 * float(np.median(seconds["exact"])),
        "ratio": float(np.median(seconds["exact"] / soba_step)),
    }

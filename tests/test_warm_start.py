"""Warm starts converge exactly at fixed steps, cold starts do not; accuracy on demand."""

from dataclasses import replace
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    exact_hypergradient,
    logistic_example,
    network_example,
    quadratic_example,
    quadratic_hypergradient,
    quadratic_problem,
    quadratic_tasks,
)

import memmeta as mm
from memmeta.certificate import Constants, deviations_from
from memmeta.hypergradient import implicit, scheduled, unrolled
from memmeta.linear_solve import cg, direct
from memmeta.meta import WarmStart

CONDITION = 10.0


def certified_problem():
    """The quadratic with its constants in θ: one unit of θ moves the context by the coupling."""
    zero, one = jnp.zeros(()), jnp.ones(())

    def constants(phi, radius, context):
        # the only leaf that reaches the inner loss is B θ
        size = jnp.linalg.norm(context[1].coupling, 2)
        return Constants(zero, one, zero, zero, one, size)

    structure = mm.Structure(deviations=deviations_from(constants))
    return replace(quadratic_problem(condition=CONDITION), structure=structure)


def make_step(inner_steps, cg_steps, **options):
    return mm.make_meta_step(
        certified_problem(),
        mm.InnerLoop(mm.inner.gradient_descent(), inner_steps),
        implicit(cg(cg_steps)),
        optax.sgd(0.05),
        report="full",
        **options,
    )


def run(step, tasks, theta, count=400):
    """θ and the error bounds after a number of meta-steps over all tasks."""
    warm = isinstance(step, WarmStart)
    extra = (jnp.arange(len(tasks.target)),) if warm else ()

    def body(state, _):
        state, metrics = step.update(state, tasks, *extra)
        return state, metrics.report.error_bound

    state = step.init(theta, tasks) if warm else step.init(theta)
    state, bounds = jax.jit(lambda s: jax.lax.scan(body, s, length=count))(state)
    return (state.meta if warm else state).meta_params, bounds


def test_warm_starts_converge_exactly_where_cold_ones_do_not(x64):
    tasks, theta = quadratic_tasks(jax.random.key(0)), jnp.ones(4)
    cold, cold_bounds = run(make_step(2, 2), tasks, theta)
    warm, warm_bounds = run(WarmStart(make_step(2, 2, task_chunk=1), 5), tasks, theta)
    at_cold = jnp.linalg.norm(quadratic_hypergradient(cold, tasks))
    at_warm = jnp.linalg.norm(quadratic_hypergradient(warm, tasks))
    assert at_cold > 1e-2
    assert at_warm < 1e-10
    # and the certificate knows: the gradient of the cold run is zero, the error of it is not
    assert cold_bounds[-1] >= at_cold
    assert warm_bounds[-1] < 1e-8


def test_host_memory_and_part_of_the_tasks(x64):
    tasks, theta = quadratic_tasks(jax.random.key(0)), jnp.ones(4)
    steps = [WarmStart(make_step(2, 2), 5, on_host=host) for host in (False, True)]
    states = [step.init(theta, tasks) for step in steps]
    for numbers in ([3, 1], [0, 3], [4, 2]):
        some = jax.tree.map(lambda x, n=numbers: x[jnp.array(n)], tasks)
        for i, step in enumerate(steps):
            states[i], metrics = step(states[i], some, jnp.array(numbers))
            assert not hasattr(metrics.tasks, "memory")
    first, second = ((s.memory, s.meta.meta_params, s.meta.optimizer) for s in states)
    chex.assert_trees_all_close(first, second, rtol=1e-12, atol=1e-15)
    assert isinstance(states[1].memory.params, np.ndarray)
    words = 4 + 8 + 2 * 4  # the count of steps, the first slope, and the key
    assert steps[0].memory_bytes(states[0]) == 2 * 5 * 6 * 8 + 5 * words


def test_the_memory_is_spread_over_a_mesh(x64):
    tasks, theta = quadratic_tasks(jax.random.key(0), 4), jnp.ones(4)
    mesh = mm.meta.task_mesh(jax.devices()[:2])
    found = []
    for step in (make_step(2, 2), make_step(2, 2, mesh=mesh)):
        warm = WarmStart(step, 4)
        state = warm.init(theta, tasks)
        for _ in range(3):
            state, _ = warm(state, tasks, jnp.arange(4))
        found.append(state)
    assert found[1].memory.params.sharding.spec == jax.sharding.PartitionSpec("tasks")
    for shard in jax.tree.leaves(jax.tree.map(lambda x: x.addressable_shards[0], found[1].memory)):
        assert shard.data.shape[0] == 2  # rows on each of the two devices
    np.testing.assert_allclose(found[0].memory.params, found[1].memory.params, rtol=1e-12)


def test_a_broken_task_keeps_its_memory(x64):
    tasks = quadratic_tasks(jax.random.key(0))
    step = WarmStart(make_step(2, 2), 5)
    state, _ = step(step.init(jnp.ones(4), tasks), tasks, jnp.arange(5))
    before = np.array(state.memory.params)
    broken = tasks._replace(target=tasks.target.at[2].set(jnp.nan))
    state, metrics = step(state, broken, jnp.arange(5))
    assert metrics.counts.masked == 1
    np.testing.assert_array_equal(state.memory.params[2], before[2])
    assert np.all(state.memory.params[3] != before[3])


@pytest.mark.parametrize("example", [quadratic_example, logistic_example, network_example])
def test_accuracy_on_demand_meets_the_tolerance(example, x64):
    """The true relative error of each task is below it, and less of it costs more."""
    found = example()
    inner = mm.InnerLoop(mm.inner.gradient_descent(), 2000)

    @jax.jit
    def on_demand(task, tolerance):
        estimator = implicit(tolerance=tolerance)
        made = estimator(found.problem, inner, found.theta, mm.hypergradient.Chunk.of(task))
        return ravel_pytree(made.gradient)[0], made.report

    for number in range(3):
        task = jax.tree.map(lambda x, n=number: x[n : n + 1], found.tasks)
        exact = ravel_pytree(exact_hypergradient(found._replace(tasks=task)))[0]
        costs, errors = [], []
        for tolerance in (0.3, 1e-2, 1e-4, 1e-8):
            gradient, report = on_demand(task, jnp.float64(tolerance))
            errors.append(float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)))
            costs.append(float(report.inner_steps[0] + report.linear_iterations[0]))
            assert errors[-1] < tolerance
            assert report.error_estimate[0] <= tolerance * jnp.linalg.norm(gradient) + 1e-15
        assert all(less < more for less, more in pairwise(costs))
        assert errors[0] > 1e-6  # no more than was asked for


def test_accuracy_on_demand_with_any_solver(x64):
    """Fixed numbers of steps in each round, and a dense solve."""
    tasks = quadratic_tasks(jax.random.key(1), tasks=1)
    exact = quadratic_hypergradient(jnp.ones(4), tasks)
    # the tolerance is in the context (B θ, θ), where the hypergradient is (v, θ)
    hessian, coupling = tasks.hessian[0], tasks.coupling[0]
    phi = jnp.linalg.solve(hessian, coupling @ jnp.ones(4))
    v = jnp.linalg.solve(hessian, phi - tasks.target[0])
    size = jnp.sqrt(v @ v + 4)
    for solver in (cg(3), direct()):
        estimator = implicit(solver, tolerance=1e-6)
        inner = mm.InnerLoop(mm.inner.gradient_descent(), 1000)
        chunk = mm.hypergradient.Chunk.of(tasks)
        found = estimator(certified_problem(), inner, jnp.ones(4), chunk)
        error = jnp.linalg.norm(found.gradient - exact)
        assert error <= found.report.error_bound[0] + 1e-12  # both are in θ here
        assert error < 1e-6 * jnp.linalg.norm(coupling, 2) * size


def test_a_new_member_spends_what_a_cold_start_does(x64):
    cold = mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(mm.inner.gradient_descent(), 1000),
        implicit(tolerance=0.1),
        optax.sgd(0.1),
    )
    warm, tasks = WarmStart(cold, 3), quadratic_tasks(jax.random.key(1), 3)
    for theta in (jnp.linspace(-1.0, 1.0, 4), jnp.zeros(4)):  # of zeros φ₀ is the minimum
        _, alone = cold(cold.init(theta), tasks)
        state, first = warm(warm.init(theta, tasks), tasks)
        _, second = warm(state, tasks)
        steps = [metrics.report.inner_steps for metrics in (alone, first, second)]
        assert steps[0] == steps[1]
        assert steps[2] < 40


def test_recycled_solutions_save_products(x64):
    """A member's last three v̂ beside its last alone: the same answers, from fewer products."""
    inner, theta = mm.InnerLoop(mm.inner.newton(None), 2), jnp.linspace(-1.0, 1.0, 4)
    tasks = quadratic_tasks(jax.random.key(1), 3, inner=60, condition=100.0)
    problem, products = quadratic_problem(60, condition=100.0), {}
    for recycled in (1, 3):
        estimator = implicit(cg(100, tolerance=1e-6), recycled=recycled)
        step = WarmStart(mm.make_meta_step(problem, inner, estimator, optax.sgd(0.01)), 3)
        state, made = step.init(jnp.copy(theta), tasks), []
        for _ in range(12):
            before = np.array(state.meta.meta_params)  # the state is donated
            exact = quadratic_hypergradient(before, tasks)
            state, metrics = step(state, tasks)
            gradient = (before - state.meta.meta_params) / 0.01
            np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-4)
            made.append(float(metrics.report.linear_iterations))
        products[recycled] = np.mean(made[4:])
    assert products[3] < 0.7 * products[1]


@pytest.mark.parametrize("tolerance", [-1e-3, 0.0, float("nan"), float("inf"), jnp.array(-1.0)])
def test_a_bad_tolerance_is_named(tolerance):
    with pytest.raises(ValueError, match=r"^tolerance: expected a finite number above 0, found"):
        implicit(tolerance=tolerance)


def test_several_solutions_and_a_tolerance_are_refused():
    with pytest.raises(ValueError, match=r"^recycled: expected 1 with a tolerance"):
        implicit(tolerance=0.1, recycled=3)
    with pytest.raises(ValueError, match=r"^recycled: expected a whole number, 1 or more"):
        implicit(recycled=0)


def test_a_tolerance_needs_an_error_to_hold():
    for options in ({"products": "gauss_newton"}, {"view": lambda context, key, step: context}):
        with pytest.raises(ValueError, match=r"^tolerance: expected None with .*Leave one of them"):
            implicit(tolerance=0.1, **options)


def one(leaf):
    return leaf[None]


def test_a_tightening_tolerance_converges(x64):
    """HOAG: errors that can be summed leave no bias, from a cold start too."""
    tasks, theta = quadratic_tasks(jax.random.key(0)), jnp.ones(4)
    step = mm.make_meta_step(
        certified_problem(),
        mm.InnerLoop(mm.inner.gradient_descent(), 500),
        scheduled(lambda t: implicit(cg(4), tolerance=jnp.power(0.9, t.astype(float)))),
        optax.sgd(0.05),
        report="full",
    )
    found, bounds = run(step, tasks, theta, count=300)
    assert jnp.linalg.norm(quadratic_hypergradient(found, tasks)) < 1e-9
    assert bounds[0] > 1e-3


def test_without_constants_the_estimate_stops_the_loop(x64):
    tasks = quadratic_tasks(jax.random.key(0))
    step = mm.make_meta_step(
        quadratic_problem(condition=CONDITION),
        mm.InnerLoop(mm.inner.gradient_descent(), 300),
        implicit(cg(4), tolerance=1e-4),
        optax.sgd(0.05),
        report="full",
    )
    found, metrics = step.gradient(step.init(jnp.ones(4)), tasks)
    exact = quadratic_hypergradient(jnp.ones(4), tasks)
    assert 1e-12 < jnp.linalg.norm(found - exact) < 1e-4 * jnp.linalg.norm(exact)
    assert metrics.report.error_bound is None


def test_errors_say_what_to_do():
    step = make_step(2, 2)
    with pytest.raises(ValueError, match="size"):
        WarmStart(step, 0)
    spread = make_step(2, 2, mesh=mm.meta.task_mesh(jax.devices()[:2]))
    with pytest.raises(ValueError, match="Round it up to 6"):
        WarmStart(spread, 5)
    assert WarmStart(spread, 5, on_host=True).size == 5
    warm = WarmStart(step, 5)
    tasks = quadratic_tasks(jax.random.key(0))
    state = warm.init(jnp.ones(4), tasks)
    with pytest.raises(ValueError, match="numbers: expected different"):
        warm(state, tasks, jnp.zeros(5, int))
    with pytest.raises(ValueError, match="one for each of the 5 tasks"):
        warm(state, tasks, jnp.arange(4))
    with pytest.raises(ValueError, match="numbers: found None for 4 of 5 tasks"):
        warm(state, jax.tree.map(lambda x: x[:4], tasks))
    with pytest.raises(ValueError, match="state: found the memory of 5 members, expected 6"):
        WarmStart(step, 6)(state, tasks)
    other = mm.make_meta_step(quadratic_problem(), mm.InnerLoop(), unrolled(), optax.sgd(0.1))
    with pytest.raises(ValueError, match="state: found a memory of another kind"):
        WarmStart(other, 5)(state, tasks)

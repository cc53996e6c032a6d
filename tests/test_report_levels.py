"""How much a meta-step reports: nothing else changes, and trouble never goes unsaid."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratic_problem, quadratic_tasks

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS

LEVELS = "full", "light", "none"
DERIVED = {"error_estimate", "error_bound"}


def make_step(level, estimator, **options):
    return mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(mm.inner.gradient_descent(), 3),
        estimator,
        optax.sgd(0.1),
        report=level,
        **options,
    )


def known(figures):
    return {name for name, value in figures._asdict().items() if value is not None}


ESTIMATES = {
    "implicit": mm.hypergradient.implicit(mm.linear_solve.cg(2)),
    "unrolled": mm.hypergradient.unrolled(),
    "first_order": mm.hypergradient.first_order(estimate_error=True),
    "forward_mode": mm.hypergradient.forward_mode(directions=2),
    "finite_difference": mm.hypergradient.finite_difference(directions=2, estimate_error=True),
    "evolution_strategies": mm.hypergradient.evolution_strategies(2, estimate_error=True),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_levels_differ_in_what_they_report_alone(x64, name):
    theta, tasks = jnp.linspace(-1.0, 1.0, 4), quadratic_tasks(jax.random.key(0), tasks=3)
    tasks = tasks._replace(target=tasks.target.at[1].set(jnp.nan))
    found, sizes = {}, []
    for level in LEVELS:
        step = make_step(level, ESTIMATES[name])
        state = step.init(theta)
        found[level] = jax.jit(step.gradient)(state, tasks)
        sizes.append(len(str(jax.make_jaxpr(step.update)(state, tasks))))
    assert sizes == sorted(set(sizes), reverse=True)
    gradients, metrics = zip(*found.values(), strict=True)
    full, light, none = metrics
    np.testing.assert_allclose(gradients[1:], [gradients[0]] * 2, rtol=1e-12)
    assert "error_estimate" in known(full.report)
    # reverse mode meets a curvature on the way to its estimate
    derived = DERIVED | ({"smallest_curvature"} if name == "unrolled" else set())
    assert known(light.report) == known(full.report) - derived
    assert known(none.report) == set() == known(none.tasks.report)
    for figure in known(light.report):
        pair = getattr(light.report, figure), getattr(full.report, figure)
        np.testing.assert_allclose(*pair, rtol=1e-9, atol=1e-12, err_msg=figure)
    assert light.counts.names == full.counts.names
    assert light.counts.numbers.tolist() == full.counts.numbers.tolist()
    assert set(none.counts.as_dict()) == {"masked", "refused"}
    assert none.counts.diverging is None
    for each in metrics:
        assert [int(each.counts.masked), int(each.used)] == [1, 2]
        np.testing.assert_allclose(each.loss, full.loss, rtol=1e-12)
        assert mm.explain(each).startswith("1 of 3 tasks left out: ")
    assert "data are not finite" in mm.explain(light)
    assert 'not asked for (report="none")' in mm.explain(none)


def test_without_a_report_it_is_said_that_nothing_was_looked_at():
    tasks = quadratic_tasks(jax.random.key(0))
    step = make_step("none", ESTIMATORS["implicit"].make())
    _, metrics = step(step.init(jnp.ones(4)), tasks)
    assert "no more was looked at" in mm.explain(metrics)


def test_an_update_that_is_not_finite_is_refused_without_a_report():
    tasks = quadratic_tasks(jax.random.key(0))
    step = mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(steps=3),
        ESTIMATORS["implicit"].make(),
        optax.sgd(jnp.inf),
        report="none",
    )
    state, metrics = step(step.init(jnp.ones(4)), tasks)
    assert int(metrics.counts.refused) == 1
    np.testing.assert_array_equal(state.meta_params, jnp.ones(4))


def test_a_strict_step_needs_a_report():
    with pytest.raises(ValueError, match="report: expected"):
        make_step("none", ESTIMATORS["implicit"].make(), strict=True)

"""Hypergradients that are zero by construction are refused when traced, and those alone."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from assertions import refused

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS


def problem(proximal=0.0, learned_rate=False):
    """θ has a start, a feature, a ridge and a rate; what enters where depends on the options."""

    def inner_loss(phi, context):
        theta, batch = context
        distance = jnp.sum((phi - theta["start"]) ** 2) if proximal else 0.0
        ridge = jnp.exp(theta["ridge"]) * jnp.sum(phi**2)
        return jnp.sum((phi * theta["feature"] - batch) ** 2) + ridge + proximal * distance

    def outer_loss(phi, context):
        theta, batch = context
        return jnp.sum((phi * theta["feature"] - batch) ** 2), {}

    return mm.Problem(lambda t, b: (t, b), inner_loss, outer_loss, lambda t: t["start"])


THETA = {"start": jnp.ones(3), "feature": jnp.ones(3), "ridge": jnp.float32(0.0)}
TASKS = jnp.ones((2, 3))


def learned_rate():
    """A solver whose rate is a meta-parameter (Meta-SGD)."""

    def update(problem, params, state, context, step, key):
        gradient = jax.grad(problem.inner_loss)(params, context)
        return params - context[0]["rate"] * gradient, state, optax.tree.norm(gradient)

    return mm.inner.InnerSolver(lambda problem, params, context: (), update)


def traced(name, theta, problem, inner=None):
    estimator = ESTIMATORS[name].make()
    loop = inner or mm.InnerLoop(mm.inner.gradient_descent(), steps=5)
    gradient = jax.eval_shape(
        lambda theta: estimator(problem, loop, theta, mm.hypergradient.Chunk.of(TASKS)).gradient,
        theta,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, theta)


IMPLICIT = ("implicit", "implicit-minres", "implicit-direct")
EVERYTHING_SEEN = ("unrolled", "mixed_mode", "hessian_free", "forward_mode", "finite_difference")


@pytest.mark.parametrize("name", [*IMPLICIT, "truncated"])
def test_a_start_without_a_proximal_term(name):
    with pytest.raises(ValueError, match=r"\['start'\] is zero by construction.*proximal term"):
        traced(name, THETA, problem())
    traced(name, THETA, problem(proximal=1.0))


@pytest.mark.parametrize("name", IMPLICIT)
def test_an_inner_rate_under_an_implicit_rule(name):
    theta = THETA | {"rate": jnp.float32(0.1)}
    with pytest.raises(ValueError, match=r"\['rate'\] is zero by construction.*unrolled\(\)"):
        traced(name, theta, problem(proximal=1.0), mm.InnerLoop(learned_rate(), steps=5))


@pytest.mark.parametrize("name", [*EVERYTHING_SEEN, "truncated"])
def test_an_inner_rate_where_steps_are_differentiated(name):
    theta = THETA | {"rate": jnp.float32(0.1)}
    traced(name, theta, problem(proximal=1.0), mm.InnerLoop(learned_rate(), steps=5))


def test_truncated_to_no_less_than_all_steps_sees_the_start():
    estimator = mm.hypergradient.truncated(last=5)
    inner = mm.InnerLoop(mm.inner.gradient_descent(), steps=5)
    jax.eval_shape(
        lambda t: estimator(problem(), inner, t, mm.hypergradient.Chunk.of(TASKS)).gradient,
        THETA,
    )


def test_first_order_refuses_what_only_the_inner_loss_sees():
    with pytest.raises(ValueError, match=r"first_order: the hypergradient of \['ridge'\] is zero"):
        traced("first_order", THETA, problem())
    start_and_feature = {k: THETA[k] for k in ("start", "feature")}

    def without_ridge(theta, batch):
        return theta | {"ridge": jnp.float32(0.0)}, batch

    base = problem()
    allowed = mm.Problem(without_ridge, base.inner_loss, base.outer_loss, base.init)
    traced("first_order", start_and_feature, allowed)


def test_reptile_refuses_all_but_the_start():
    with pytest.raises(ValueError, match=r"\['feature'\], \['ridge'\] is zero"):
        traced("reptile", THETA, problem())


@pytest.mark.parametrize("name", EVERYTHING_SEEN)
def test_nothing_is_refused_where_everything_is_seen(name):
    traced(name, THETA, problem())


def test_estimators_for_heads_say_so():
    for name in ("sample_space-steps", "sample_space-solution", "implicit-woodbury"):
        with pytest.raises(ValueError, match=r"expected a problem with a `structure.head`"):
            traced(name, THETA, problem(proximal=1.0))


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda h: h.unrolled("some"), "remat", "expected one of 'none', 'step', 'sqrt', 'recurs"),
        (
            lambda h: h.truncated(0),
            "last",
            "expected a whole number, 1 or more, below 2³¹, found 0",
        ),
        (
            lambda h: h.forward_mode(0),
            "directions",
            "expected a whole number, 1 or more, below 2³¹",
        ),
        (lambda h: h.evolution_strategies(4, scale=0.0), "scale", "expected a finite number above"),
        (lambda h: h.finite_difference(4, scale=-1.0), "scale", "expected a finite number above 0"),
        (lambda h: h.hessian_free(0.0), "scale", "expected a finite number above 0, found 0.0"),
        (lambda h: h.perturbed(0.0), "delta", "expected a finite number above 0, found 0.0"),
        (lambda h: h.sample_space("all"), "differentiate", "expected one of 'steps', 'solution'"),
    ],
)
def test_bad_options_are_named(make, name, message):
    with refused(name, message):
        make(mm.hypergradient)

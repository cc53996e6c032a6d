"""The proposed settings keep their promise."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import quadratic_hypergradient, quadratic_problem, quadratic_tasks

import memmeta as mm
from memmeta.hypergradient import implicit
from memmeta.linear_solve import cg
from memmeta.meta import propose


def test_promise_on_the_quadratic(x64):
    tasks, theta, accuracy = quadratic_tasks(jax.random.key(0)), jnp.ones(4), 1e-2
    found = propose(quadratic_problem(), theta, tasks, accuracy)
    step = mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(steps=found.inner_steps),
        implicit(cg(found.cg_steps)),
        optax.sgd(found.outer_rate),
    )
    exact = quadratic_hypergradient(theta, tasks)
    bias = step.gradient(step.init(theta), tasks)[0] - exact
    assert jnp.sum(bias**2) <= accuracy / 3
    hessian = jax.jacobian(lambda t: quadratic_hypergradient(t, tasks))(theta)
    assert found.outer_smoothness == pytest.approx(float(jnp.linalg.norm(hessian, 2)), rel=0.05)

    def body(state, _):
        square = jnp.sum(quadratic_hypergradient(state.meta_params, tasks) ** 2)
        return step.update(state, tasks)[0], square

    _, squares = jax.jit(lambda s: jax.lax.scan(body, s, length=1000))(step.init(theta))
    assert squares[-1] < 1e-10  # so that the rest adds nothing
    assert jnp.sum(squares) / found.meta_steps <= accuracy
    assert "Guarantee" in str(found)
    assert found.given == ("smoothness", "strong_convexity")


def test_errors_say_what_to_do():
    tasks = quadratic_tasks(jax.random.key(0))
    with pytest.raises(ValueError, match="accuracy"):
        propose(quadratic_problem(), jnp.ones(4), tasks, 0.0)
    with pytest.raises(ValueError, match="at least 2"):
        propose(quadratic_problem(), jnp.ones(4), jax.tree.map(lambda x: x[:1], tasks), 1.0)
    flat = replace(quadratic_problem(), strong_convexity=lambda c: jnp.zeros(()))
    with pytest.raises(ValueError, match="ridge"):
        propose(flat, jnp.ones(4), tasks, 1.0)

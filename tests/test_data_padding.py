"""A padded episode is the episode without its padding, to every loss, statistic and accuracy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memmeta import few_shot
from memmeta.few_shot import head_problem, network_problem
from memmeta.models import conv4, mlp
from memmeta.problem import Task

WAYS, SHAPE = 4, (6, 6, 1)


def make_tasks():
    """A task, and the same with padding in between whose inputs are anything but zero."""
    keys = jax.random.split(jax.random.key(0), 3)
    support_targets = jnp.array([0, 0, 1, 1, 2, 2], jnp.int32)
    query_targets = jnp.array([0, 1, 2], jnp.int32)
    inputs = jax.random.normal(keys[0], (9, *SHAPE))
    whole = Task(inputs[:6], support_targets, inputs[6:], query_targets)

    def padded(array, noise):
        rows = jnp.arange(2 * len(array))
        place = (rows % 2 == 0).reshape(-1, *(1,) * (array.ndim - 1))
        return jnp.where(place, jnp.repeat(array, 2, axis=0), noise)

    noise = 3 * jax.random.normal(keys[1], (12, *SHAPE))
    return whole, Task(
        padded(whole.support_inputs, noise),
        padded(support_targets, jnp.int32(-1)),
        padded(whole.query_inputs, noise[:6]),
        padded(query_targets, jnp.int32(-1)),
    )


def make_problem(name, statistics):
    network = conv4(WAYS, width=3, image_shape=SHAPE, depth=2)
    if name == "head":
        return network, head_problem(network, 0.1, True, statistics)
    return network, network_problem(network, "all", 0.5, statistics)


@pytest.mark.parametrize("statistics", ["transductive", "support", "separate"])
@pytest.mark.parametrize("name", ["head", "network"])
def test_losses_gradients_and_accuracy(name, statistics):
    network, problem = make_problem(name, statistics)
    theta = network.init(jax.random.key(1))
    params = jax.tree.map(lambda x: x + jnp.float32(0.1), problem.init(theta))

    @jax.jit
    def figures(task):
        def losses(theta, params):
            context = problem.embed(theta, task)
            inner, (outer, aux) = (
                problem.inner_loss(params, context),
                problem.outer_loss(params, context),
            )
            return inner + outer, (inner, outer, aux)

        return jax.grad(losses, argnums=(0, 1), has_aux=True)(theta, params)

    whole, padded = make_tasks()
    chex.assert_trees_all_close(figures(padded), figures(whole), atol=2e-5)


def test_curvature_bound_and_closed_form(x64):
    whole, padded = make_tasks()
    network = mlp(WAYS, (), SHAPE)
    problem = head_problem(network, 0.1, False)
    theta = network.init(jax.random.key(1))
    contexts = [problem.embed(theta, task) for task in (whole, padded)]
    bounds = [problem.smoothness(context) for context in contexts]
    np.testing.assert_allclose(*bounds, rtol=0.1)  # each is a bound, within 16 % of the truth
    solutions = [few_shot.ridge_solution(context, 0.1, WAYS) for context in contexts]
    chex.assert_trees_all_close(*solutions, atol=1e-5)
    losses = [
        problem.structure.head(c).support_loss(jnp.ones((len(c.support_targets), WAYS)))
        for c in contexts
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)

r"""Strongly convex softmax heads on linear features, with a reference of ∇F to rounding.

The features of task i are X_i θ. The reference makes Newton steps inside until the gradient is
rounding, and solves the linear system by its eigenvectors.

A θ that grows makes the heads' ridge vanish, and query samples that can be told apart then pull F
towards its infimum at infinity, which no iteration reaches. With λ/2 ‖θ‖² added there is a minimum.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import memmeta as mm
from memmeta.few_shot import HeadContext, softmax_problem
from memmeta.inner import newton
from memmeta.problem import Task

WAYS, SAMPLES, INPUTS, FEATURES = 3, 12, 6, 4
REFERENCE_STEPS = 12


@dataclass(frozen=True)
class Heads:
    """Tasks of classifying three Gaussian clouds through shared linear features."""

    ridge: float = 0.1  # ρ = μ
    decay: float = 0.0  # λ, of θ

    def sample(self, key: Array, count: int) -> Task:
        """`count` independent tasks."""
        keys = jax.random.split(key, 3)
        labels = jnp.broadcast_to(jnp.arange(SAMPLES) % WAYS, (count, SAMPLES))
        means = 1.5 * jax.random.normal(keys[0], (count, WAYS, INPUTS))
        centres = jax.vmap(lambda m, y: m[y])(means, labels)
        noise = jax.random.normal(keys[1], (2, *centres.shape))
        return Task(centres + noise[0], labels, centres + noise[1], labels)

    def start(self, key: Array) -> Array:
        return jax.random.normal(key, (INPUTS, FEATURES)) / jnp.sqrt(float(INPUTS))

    def problem(self) -> mm.Problem:
        """The bilevel problem; its certificates hold in the space of the features."""

        def embed(theta: Array, task: Task) -> HeadContext:
            support, query = task.support_inputs @ theta, task.query_inputs @ theta
            return HeadContext(support, task.support_targets, query, task.query_targets)

        zeros = {"kernel": jnp.zeros((FEATURES, WAYS)), "bias": jnp.zeros(WAYS)}
        return softmax_problem(embed, lambda theta: zeros, self.ridge)

    def gradient(self, theta: Array, tasks: Task) -> Array:
        """∇F + λ θ, to rounding."""
        reference = mm.make_meta_step(
            self.problem(),
            mm.InnerLoop(newton(None), REFERENCE_STEPS),
            mm.hypergradient.implicit(mm.linear_solve.direct()),
            optax.identity(),
        )
        return reference.gradient(reference.init(theta), tasks)[0] + self.decay * theta

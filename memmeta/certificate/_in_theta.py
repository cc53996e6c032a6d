r"""From errors in the context to the error of the meta-step in θ, by a bound on ‖∂c/∂θ‖.

No closed form is known of that norm for a network. A few vector-Jacobian products bound it with a
failure probability that can be stated.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta._shared import checks, trees
from memmeta.linear_solve._solution import unit
from memmeta.problem import Batch, Context, MetaParams, Problem, Scalar

PROBES = 2
"""Random directions to begin from: with q of them a failure probability p costs p^(-1/2kq)."""


def error_in_theta(
    problem: Problem,
    meta_params: MetaParams,
    tasks: Batch,
    bounds: Float[Array, " tasks"],
    key: Key[Array, ""],
    *,
    failure: float = 1e-6,
    steps: int = 8,
) -> Scalar:
    r"""A bound on the error of a whole meta-step's hypergradient, true but for a stated chance.

    $$\Big\|\frac1n \sum_i (\hat\nabla F_i - \nabla F_i)\Big\| \le
      \frac1n \sum_i \Big\|\frac{\partial c_i}{\partial\theta}\Big\| \, \text{bound}_i$$

    with each norm from `steps` products with $(\partial c/\partial\theta)^\top \partial c/\partial
    \theta$ from each of two Gaussian directions. Takes the time of about 6 · `steps` passes through
    `embed`, forward and back, one task after the other; the memory is that of one task.

    Args:
        problem: whose `embed` is looked at.
        meta_params: θ.
        tasks: every leaf with a leading axis of tasks, all of weight 1.
        bounds: [tasks] on ‖∇̂F_i − ∇F_i‖ in the context: `metrics.tasks.report.error_bound` of a
            step made with `report="full"`.
        key: of the directions; has to be independent of θ and the tasks.
        failure: the chance that any of the norms is larger than what is taken for it, in (0, 1).
        steps: k; the norms come out too large by a factor of about (n/p)^(1/4k) for n numbers in θ
            at failure p a task, less where few directions dominate. At n = 10⁵, p = 10⁻⁶ and k = 8
            that is 2.2.

    Returns:
        The bound; infinite where one of `bounds` is.

    Raises:
        ValueError: `failure` is not between 0 and 1, or `steps` is not positive.

    Source: power iteration from a random start: Dixon (1983); Kuczyński and Woźniakowski (1992).
    The form used here is derived in docs/theory.md, section "In which space".

    Example:
        >>> from memmeta.problem import Problem
        >>> problem = Problem(
        ...     embed=lambda theta, task: 3.0 * task * theta,
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum(phi**2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> bounds, key = jnp.array([0.1, 0.1]), jax.random.key(0)
        >>> found = error_in_theta(problem, jnp.ones(5), jnp.ones((2, 5)), bounds, key)
        >>> 0.3 <= float(found) < 0.6
        True
    """
    checks.probability("failure", failure)
    checks.count("steps", steps)
    count = trees.leading_size(tasks, "tasks")

    def one(task_and_key: tuple[Any, Array]) -> Scalar:
        task, key = task_and_key
        return embedding_norm(problem, meta_params, task, key, failure / count, steps)

    norms = jax.lax.map(one, (tasks, jax.random.split(key, count)))
    return jnp.mean(norms.astype(bounds.dtype) * bounds)


def embedding_norm(
    problem: Problem, meta_params: MetaParams, task: Any, key: Array, failure: float, steps: int
) -> Scalar:
    r"""A bound on ‖∂c/∂θ‖ of one task that fails with a chance of at most p = `failure`.

    $$\Big\|\frac{\partial c}{\partial\theta}\Big\| \le
      \Big(\frac{\max_j \|A^k \omega_j\|}{p^{1/q} \sqrt{\pi/2}}\Big)^{1/2k}, \qquad
      A = \Big(\frac{\partial c}{\partial\theta}\Big)^\top \frac{\partial c}{\partial\theta},
      \quad \omega_1 \dots \omega_q \sim N(0, I)$$
    """
    floats, others = trees.split_inexact(meta_params)

    def embed(floats: MetaParams) -> Context:
        return trees.split_inexact(problem.embed(trees.merge(floats, others), task))[0]

    _, forward = jax.linearize(embed, floats)
    backward = jax.linear_transpose(forward, floats)

    def from_direction(key: Array) -> Scalar:
        leaves, structure = jax.tree.flatten(floats)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        start = jax.tree.unflatten(structure, drawn)
        return _log_length(lambda u: backward(forward(u))[0], start, steps)

    longest = jnp.max(jax.lax.map(from_direction, jax.random.split(key, PROBES)))
    level = math.log(failure) / PROBES + 0.5 * math.log(math.pi / 2)
    return jnp.exp((longest - level) / (2 * steps))


def _log_length(product: Callable[[Any], Any], start: Any, steps: int) -> Scalar:
    """log ‖A^k ω‖, with no power of A that could overflow."""

    def body(vector: Any, _: None) -> tuple[Any, Scalar]:
        image, length = unit(product(vector))
        return image, jnp.log(length)

    first, length = unit(start)
    _, logs = jax.lax.scan(body, first, length=steps)
    return jnp.log(length) + jnp.sum(logs)

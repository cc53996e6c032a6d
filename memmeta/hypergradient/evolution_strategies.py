r"""Antithetic evolution strategies: no derivative at all."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta import trees
from memmeta.hypergradient.directions import along_directions, check_directions, task_losses
from memmeta.hypergradient.estimator import Estimator, Hypergradient
from memmeta.inner import InnerLoop
from memmeta.problem import Batch, MetaParams, Problem


def evolution_strategies(directions: int = 16, scale: float = 1e-2) -> Estimator:
    r"""Differences of outer losses after inner loops from perturbed meta-parameters.

    $$\hat\nabla F_i = \frac1m \sum_{j=1}^m
      \frac{F_i(\theta + \sigma u_j) - F_i(\theta - \sigma u_j)}{2\sigma}\, u_j$$

    Unbiased for F smoothed over σ: its bias for F itself is O(σ²) by the third derivative.

    Args:
        directions: m, drawn from {−1, 1}^dim θ, the same for all tasks of a meta-step.
        scale: σ.

    Returns:
        The estimator.

    Raises:
        ValueError: `directions` is less than 1, or `scale` is not positive.

    Source: Salimans, Ho, Chen, Sidor, Sutskever (2017), section 2; for MAML: Song et al. (ICLR
    2020), Algorithm 2.

    Example:
        >>> estimator = evolution_strategies(directions=16, scale=1e-2)
    """
    check_directions(directions)
    if not scale > 0:
        raise ValueError(f"scale: expected a positive step length, found {scale}.")

    def estimator(
        problem: Problem,
        inner: InnerLoop,
        meta_params: MetaParams,
        tasks: Batch,
        weights: Float[Array, " tasks"],
        key: Key[Array, ""],
    ) -> Hypergradient:
        floats, others = trees.split_inexact(meta_params)

        def losses(floats: MetaParams) -> tuple[Float[Array, " tasks"], tuple]:
            return task_losses(problem, inner, floats, others, tasks)

        def derivatives(direction: MetaParams) -> Float[Array, " tasks"]:
            plus, minus = (shifted(floats, direction, sign * scale) for sign in (1, -1))
            return (losses(plus)[0] - losses(minus)[0]) / (2 * scale)

        loss, (aux, report) = losses(floats)
        weights = jnp.where(jnp.isfinite(loss), weights, 0)
        found = along_directions(derivatives, floats, weights, key, directions)
        report = report._replace(standard_error=found.standard_error)
        return Hypergradient(found.gradient, found.usable, loss, aux, report)

    return estimator


def shifted(floats: MetaParams, direction: MetaParams, length: float) -> MetaParams:
    """θ + length · u."""
    return jax.tree.map(lambda x, u: x + jnp.asarray(length, x.dtype) * u, floats, direction)

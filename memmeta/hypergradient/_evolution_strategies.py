r"""Antithetic evolution strategies: no derivative at all."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.hypergradient._differences import shifted
from memmeta.hypergradient._directions import along_directions, losses_and_reports, task_losses
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient
from memmeta.hypergradient._structural_zeros import loop_seen, refuse_structural_zeros
from memmeta.inner import InnerLoop
from memmeta.problem import MetaParams, Problem


@named
def evolution_strategies(
    directions: int = 16, scale: float = 1e-2, *, estimate_error: bool = False
) -> Estimator:
    r"""Differences of outer losses after inner loops from perturbed meta-parameters.

    $$\hat\nabla F_i = \frac1m \sum_{j=1}^m
      \frac{F_i(\theta + \sigma u_j) - F_i(\theta - \sigma u_j)}{2\sigma}\, u_j$$

    Unbiased for F smoothed over σ: its bias for F itself is O(σ²) by the third derivative. A rate
    that the inner solver takes from the curvature moves with θ here; estimators that differentiate
    the steps hold it fixed.

    Args:
        directions: m, drawn from {−1, 1}^dim θ, the same for all tasks of a meta-step.
        scale: σ.
        estimate_error: see `forward_mode`; it takes derivatives, so it is to be asked for.

    Returns:
        The estimator.

    Raises:
        ValueError: `directions` is less than 1, or `scale` is not positive.

    Source: Salimans, Ho, Chen, Sidor, Sutskever (2017), section 2; for MAML: Song et al. (ICLR
    2020), Algorithm 2.

    Example:
        >>> estimator = evolution_strategies(directions=16, scale=1e-2)
    """
    checks.count("directions", directions)
    checks.positive("scale", scale)

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        refuse_structural_zeros(
            problem, inner, meta_params, chunk, "evolution_strategies", loop_seen
        )
        floats, _ = trees.split_inexact(meta_params)
        losses = task_losses(problem, inner, meta_params, chunk, differentiated=False)

        def derivatives(direction: MetaParams) -> Float[Array, " tasks"]:
            plus, minus = (shifted(floats, direction, sign * scale) for sign in (1, -1))
            return (losses(plus) - losses(minus)) / (2 * scale)

        estimating = estimate_error and chunk.wanted.errors
        loss, aux, report, memory = losses_and_reports(
            problem, inner, meta_params, chunk, estimating
        )
        weights = jnp.where(jnp.isfinite(loss), chunk.weights, 0)
        found = along_directions(derivatives, floats, weights, chunk.key, directions)
        report = report._replace(standard_error=found.standard_error)
        return Hypergradient(found.gradient, found.usable, loss, aux, report, memory)

    return estimator

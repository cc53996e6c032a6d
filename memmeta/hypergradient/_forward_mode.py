r"""Forward-mode differentiation of the inner loop: exact, or along random directions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.hypergradient._directions import along_directions, losses_and_reports, task_losses
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient
from memmeta.hypergradient._structural_zeros import loop_seen, refuse_structural_zeros
from memmeta.inner import InnerLoop
from memmeta.problem import MetaParams, Problem

WIDTH = 16
"""Tangents carried at once: memory against the number of passes."""


@named
def forward_mode(directions: int | None = None, *, estimate_error: bool = True) -> Estimator:
    r"""The gradient of the loop as it is run, by tangents carried along; memory is flat in K.

    $$\nabla F_i = \sum_j \langle \nabla F_i, e_j \rangle e_j \quad\text{(exact)}, \qquad
      \hat\nabla F_i = \frac1m \sum_{j=1}^m \langle \nabla F_i, u_j \rangle u_j,\;
      u_j \in \{-1, 1\}^{\dim\theta}$$

    Args:
        directions: m random directions, the same for all tasks of a meta-step: unbiased, with
            variance (dim θ − 1) ‖∇F‖² / m, reported as `standard_error`. None takes every
            coordinate: exact, for few meta-parameters, at the cost of dim θ tangents (16 at once).
        estimate_error: whether the report has an `error_estimate` where the problem gives its
            `strong_convexity`: of the loop alone, the draw's part is the `standard_error`. It
            costs three mixed products and three gradients, whatever K.

    Returns:
        The estimator.

    Raises:
        ValueError: `directions` is less than 1.

    Source: Franceschi, Donini, Frasconi, Pontil (ICML 2017), section 3.2; random directions: Shen,
    Wang, Lin, Qi, Xu, Wu, Chen, "Memory-Efficient Gradient Unrolling for Large-Scale Bi-level
    Optimization" ((FG)²U, NeurIPS 2024), equation 7.

    Example:
        >>> exact, unbiased = forward_mode(), forward_mode(directions=8)
    """
    if directions is not None:
        checks.count("directions", directions)

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        refuse_structural_zeros(problem, inner, meta_params, chunk, "forward_mode", loop_seen)
        floats, _ = trees.split_inexact(meta_params)
        losses = task_losses(problem, inner, meta_params, chunk, differentiated=True)

        def derivatives(direction: MetaParams) -> Float[Array, " tasks"]:
            try:
                change: Array = jax.jvp(losses, (floats,), (direction,))[1]
                return change
            except TypeError as error:
                if "forward-mode" not in str(error):
                    raise
                raise ValueError(
                    "forward_mode: a loss, embed or init uses jax.custom_vjp, which has no forward "
                    "derivative. Write the rule with jax.custom_jvp, or use unrolled()."
                ) from error

        estimating = estimate_error and chunk.wanted.errors
        loss, aux, report, memory = losses_and_reports(
            problem, inner, meta_params, chunk, estimating
        )
        weights = jnp.where(jnp.isfinite(loss), chunk.weights, 0)
        if directions is not None:
            found = along_directions(derivatives, floats, weights, chunk.key, directions)
            report = report._replace(standard_error=found.standard_error)
            return Hypergradient(found.gradient, found.usable, loss, aux, report, memory)
        gradient, usable = _along_coordinates(derivatives, floats, weights)
        return Hypergradient(gradient, usable, loss, aux, report, memory)

    return estimator


def _along_coordinates(
    derivatives: Callable[[MetaParams], Array], floats: MetaParams, weights: Float[Array, " tasks"]
) -> tuple[MetaParams, Array]:
    flat, unravel = trees.ravel(floats)

    def one(index: Array) -> Float[Array, " tasks"]:
        return derivatives(unravel(jnp.zeros_like(flat).at[index].set(1)))

    along = jax.lax.map(one, jnp.arange(flat.size), batch_size=min(WIDTH, flat.size))
    usable = jnp.all(jnp.isfinite(along), axis=0) & (weights > 0)
    total = jnp.where(usable, along * weights.astype(along.dtype), 0).sum(axis=1)
    return unravel(total.astype(flat.dtype)), usable

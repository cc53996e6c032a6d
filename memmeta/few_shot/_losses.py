"""The losses of a linear head, softmax or squared, and the problems made of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta._shared import checks, trees
from memmeta.few_shot._curvature import squared_norm_bound
from memmeta.few_shot._examples import (
    classes_of,
    cross_entropies,
    query_mean,
    shares,
    squared_errors,
    weighted_mean,
)
from memmeta.few_shot._head import HeadContext, HeadParams, augmented
from memmeta.few_shot._head_constants import SOFTMAX, SQUARED, Caps, head_deviations
from memmeta.linear_solve import cg
from memmeta.problem import (
    Batch,
    LinearHead,
    MetaParams,
    Params,
    Problem,
    Scalar,
    Structure,
)

REFINING_STEPS = 50
"""Of conjugate gradients, for the better answer that a head's error bound is taken by way of."""


class HeadLoss(NamedTuple):
    """One kind of loss of a linear head.

    Attributes:
        of_examples: (outputs, targets, classes) -> the loss of each example.
        caps: bounds on its second and third derivative by the outputs.
    """

    of_examples: Callable[[Array, Array, Array], Array]
    caps: Caps


SOFTMAX_LOSS = HeadLoss(cross_entropies, SOFTMAX)
SQUARED_LOSS = HeadLoss(squared_errors, SQUARED)


def by_context(context: HeadContext) -> HeadLoss:
    """Softmax for integer targets, squared for floating-point ones."""
    return SQUARED_LOSS if trees.is_inexact(context.support_targets) else SOFTMAX_LOSS


def linear_head_problem(
    embed: Callable[[MetaParams, Batch], HeadContext],
    init: Callable[[MetaParams], Params],
    ridge: float,
    loss_of: Callable[[HeadContext], HeadLoss] = by_context,
) -> Problem:
    r"""The problem of a linear head on features, with its curvature bounds and its structure.

    $$g = \sum_i \frac{w_i}{\sum_j w_j} \ell(x_i^\top W + b, y_i)
      + \tfrac{\text{ridge}}{2} (\|W\|^2 + \|b\|^2), \qquad
      f = \tfrac1m \sum_j \ell(x_j'^\top W + b, y_j')$$
    $$\partial^2 g \preceq L I, \quad L = a \, \lambda_{\max}\big(\textstyle\sum_i
      \frac{w_i}{\sum_j w_j} \tilde x_i \tilde x_i^\top\big) + \text{ridge}$$

    with a = ½ for softmax, because diag(p) − ppᵀ ⪯ ½ I, and 1 for squared errors.

    Returns:
        The problem; everything in it is computed in float32 at least.
    """
    checks.not_negative("ridge", ridge)

    def smoothness(context: HeadContext) -> Scalar:
        features = augmented(context.support_features)
        weights = shares(context.weights, features.dtype)
        largest = squared_norm_bound(features * jnp.sqrt(weights)[:, None])
        return loss_of(context).caps[0] * largest + ridge

    def strong_convexity(context: HeadContext) -> Scalar:
        return jnp.asarray(ridge).astype(trees.accumulator(context.support_features.dtype))

    def inner_loss(params: HeadParams, context: HeadContext) -> Scalar:
        logits = _logits(params, context.support_features)
        penalty = sum(jnp.sum(p.astype(logits.dtype) ** 2) for p in params.values())
        loss = _support_mean(loss_of(context), context, logits)
        return loss + 0.5 * jnp.asarray(ridge).astype(logits.dtype) * penalty

    def outer_loss(params: HeadParams, context: HeadContext) -> tuple[Scalar, Any]:
        logits = _logits(params, context.query_features)
        return _query_mean(loss_of(context), context, logits)

    def head(context: HeadContext) -> LinearHead:
        features = augmented(context.support_features)
        return LinearHead(
            features,
            augmented(context.query_features),
            partial(_support_mean, loss_of(context), context),
            partial(_query_mean, loss_of(context), context),
            jnp.asarray(ridge).astype(features.dtype),
        )

    def deviations(problem: Problem, *rest: Any) -> Any:
        return head_deviations(loss_of(rest[-1]).caps, problem, *rest)

    # without a ridge there is no bound to sharpen
    solver = cg(REFINING_STEPS) if ridge > 0 else None
    structure = Structure(head, deviations, solver)
    return Problem(embed, inner_loss, outer_loss, init, smoothness, strong_convexity, structure)


def _logits(params: HeadParams, features: Array) -> Array:
    dtype = trees.accumulator(features.dtype)
    kernel, bias = params["kernel"].astype(dtype), params["bias"].astype(dtype)
    return features.astype(dtype) @ kernel + bias


def _support_mean(loss: HeadLoss, context: HeadContext, logits: Float[Array, "n ways"]) -> Scalar:
    classes = classes_of(context.support_targets, logits.shape[-1])
    values = loss.of_examples(logits, context.support_targets, classes)
    return weighted_mean(values, context.weights)


def _query_mean(
    loss: HeadLoss, context: HeadContext, logits: Float[Array, "n ways"]
) -> tuple[Scalar, dict[str, Scalar]]:
    targets = (context.query_targets, context.support_targets)
    return query_mean(loss.of_examples, logits, *targets)


def softmax_problem(
    embed: Callable[[MetaParams, Batch], HeadContext],
    init: Callable[[MetaParams], Params],
    ridge: float,
) -> Problem:
    """The problem of a softmax head on features: cross-entropies of class indices, and a ridge.

    Args:
        embed: (θ, batch) -> `HeadContext`.
        init: θ -> {"kernel": [features, ways], "bias": [ways]}.
        ridge: finite, 0 or more; positive makes g strongly convex.

    Returns:
        The problem, with its curvature bounds and its `Structure`.

    Raises:
        ValueError: `ridge` is negative or not finite.

    Example:
        >>> problem = softmax_problem(
        ...     embed=lambda theta, batch: HeadContext(batch @ theta, None, batch @ theta, None),
        ...     init=lambda theta: {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)},
        ...     ridge=0.1,
        ... )
    """
    return linear_head_problem(embed, init, ridge, lambda context: SOFTMAX_LOSS)


def squared_problem(
    embed: Callable[[MetaParams, Batch], HeadContext],
    init: Callable[[MetaParams], Params],
    ridge: float,
) -> Problem:
    """The same with half the squared error; class indices stand for their one-hot vectors."""
    return linear_head_problem(embed, init, ridge, lambda context: SQUARED_LOSS)

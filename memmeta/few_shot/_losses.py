"""The losses of a linear head, softmax or squared, and the problems made of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from memmeta import _checks, trees
from memmeta.few_shot._curvature import smoothness_bound, squared_smoothness_bound
from memmeta.few_shot._examples import cross_entropies, judged, squared_errors, weighted_mean
from memmeta.few_shot._head import HeadContext, HeadParams, augmented
from memmeta.few_shot._head_constants import SOFTMAX, SQUARED, head_deviations
from memmeta.problem import (
    Batch,
    Context,
    LinearHead,
    MetaParams,
    Params,
    Problem,
    Scalar,
    Structure,
)


def softmax_inner_loss(params: HeadParams, context: HeadContext, ridge: Any) -> Scalar:
    r"""Mean cross-entropy on the support examples plus a ridge.

    $$g = \sum_i \frac{w_i}{\sum_j w_j} \mathrm{CE}(x_i^\top W + b, y_i)
      + \tfrac{\text{ridge}}{2} (\|W\|^2 + \|b\|^2)$$

    Args:
        params: {"kernel": [features, ways], "bias": [ways]}.
        context: of one task, integer targets.
        ridge: scalar, 0 or more; positive makes g strongly convex.

    Returns:
        g, in float32 at least.

    Example:
        >>> context = HeadContext(jnp.eye(2), jnp.arange(2), jnp.eye(2), jnp.arange(2))
        >>> params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
        >>> round(float(softmax_inner_loss(params, context, 0.1)), 4)
        0.6931
    """
    return _inner_loss(cross_entropies, params, context, ridge)


def softmax_outer_loss(
    params: HeadParams, context: HeadContext
) -> tuple[Scalar, dict[str, Scalar]]:
    """Mean cross-entropy on the query examples.

    Args:
        params: {"kernel": [features, ways], "bias": [ways]}.
        context: of one task, integer targets.

    Returns:
        f, and {"accuracy": fraction of query examples classified rightly}.

    Example:
        >>> context = HeadContext(jnp.eye(2), jnp.arange(2), jnp.eye(2), jnp.arange(2))
        >>> loss, aux = softmax_outer_loss({"kernel": jnp.eye(2), "bias": jnp.zeros(2)}, context)
        >>> round(float(loss), 4), float(aux["accuracy"])
        (0.3133, 1.0)
    """
    return _outer_loss(cross_entropies, params, context)


def squared_inner_loss(params: HeadParams, context: HeadContext, ridge: Any) -> Scalar:
    """Half the mean squared error on the support examples plus ridge/2 · ‖Φ‖².

    Arguments as for `softmax_inner_loss`; integer targets stand for their one-hot vectors.
    """
    return _inner_loss(squared_errors, params, context, ridge)


def squared_outer_loss(
    params: HeadParams, context: HeadContext
) -> tuple[Scalar, dict[str, Scalar]]:
    """Half the mean squared error on the query examples, and the accuracy of the largest output."""
    return _outer_loss(squared_errors, params, context)


def _inner_loss(losses: Callable, params: HeadParams, context: HeadContext, ridge: Any) -> Scalar:
    logits = _logits(params, context.support_features)
    mean = weighted_mean(losses(logits, context.support_targets), context.weights)
    return mean + _penalty(params, ridge, logits.dtype)


def _outer_loss(losses: Callable, params: HeadParams, context: HeadContext) -> tuple:
    logits = _logits(params, context.query_features)
    return judged(losses, logits, context.query_targets)


def _logits(params: HeadParams, features: Array) -> Array:
    dtype = trees.accumulator(features.dtype)
    kernel, bias = params["kernel"].astype(dtype), params["bias"].astype(dtype)
    return features.astype(dtype) @ kernel + bias


def _penalty(params: HeadParams, ridge: Any, dtype: Any) -> Scalar:
    squares = sum(jnp.sum(p.astype(dtype) ** 2) for p in (params["kernel"], params["bias"]))
    return 0.5 * jnp.asarray(ridge).astype(dtype) * squares


def _describe(losses: Callable, context: HeadContext, ridge: Any) -> LinearHead:
    features = augmented(context.support_features)
    return LinearHead(
        features,
        augmented(context.query_features),
        lambda logits: weighted_mean(losses(logits, context.support_targets), context.weights),
        lambda logits: judged(losses, logits, context.query_targets),
        jnp.asarray(ridge).astype(features.dtype),
    )


def softmax_problem(
    embed: Callable[[MetaParams, Batch], HeadContext],
    init: Callable[[MetaParams], Params],
    ridge: float,
) -> Problem:
    """The problem of a softmax head on features, with its curvature bounds and its description.

    Args:
        embed: (θ, batch) -> `HeadContext`.
        init: θ -> {"kernel": [features, ways], "bias": [ways]}.
        ridge: 0 or more.

    Returns:
        The problem.

    Raises:
        ValueError: `ridge` is negative.

    Example:
        >>> problem = softmax_problem(
        ...     embed=lambda theta, batch: HeadContext(batch @ theta, None, batch @ theta, None),
        ...     init=lambda theta: {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)},
        ...     ridge=0.1,
        ... )
    """
    losses = (softmax_inner_loss, softmax_outer_loss, smoothness_bound, cross_entropies)
    return _head_problem(losses, SOFTMAX, embed, init, ridge)


def squared_problem(
    embed: Callable[[MetaParams, Batch], HeadContext],
    init: Callable[[MetaParams], Params],
    ridge: float,
) -> Problem:
    """The same with squared losses, arguments as for `softmax_problem`."""
    losses = (squared_inner_loss, squared_outer_loss, squared_smoothness_bound, squared_errors)
    return _head_problem(losses, SQUARED, embed, init, ridge)


def _head_problem(
    losses: tuple, caps: tuple, embed: Callable, init: Callable, ridge: float
) -> Problem:
    _checks.not_negative("ridge", ridge)
    inner_loss, outer_loss, smoothness, by_logits = losses

    def strong_convexity(context: Context) -> Scalar:
        dtype = trees.accumulator(context.support_features.dtype)
        return jnp.asarray(ridge).astype(dtype)

    return Problem(
        embed=embed,
        inner_loss=partial(inner_loss, ridge=ridge),
        outer_loss=outer_loss,
        init=init,
        smoothness=partial(smoothness, ridge=ridge),
        strong_convexity=strong_convexity,
        structure=Structure(
            head=lambda context: _describe(by_logits, context, ridge),
            deviations=partial(head_deviations, caps),
        ),
    )

r"""The linear head: its context, losses, curvature bound and closed form.

With X̃ = [X, 1] the features and a column of ones, and Φ = [kernel; bias]:

    g(Φ) = ℓ(X̃ Φ) + ridge/2 · ‖Φ‖²,      f(Φ) = ℓ_query(X̃_query Φ)

where ℓ is the mean cross-entropy (softmax) or half the mean squared error (squared).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Shaped

from memmeta import trees
from memmeta.problem import Batch, Context, MetaParams, Params, Problem, Scalar

HeadParams: TypeAlias = dict[str, Float[Array, "..."]]
"""{"kernel": [features, ways], "bias": [ways]}."""

SQUARINGS = 5


class HeadContext(NamedTuple):
    """What the losses of a linear head need of one task.

    Attributes:
        support_features: [support, features], floating point.
        support_targets: [support] class indices (int32; -1 is padding and has no weight), or
            [support, ways] values (squared loss).
        query_features: [query, features].
        query_targets: [query] class indices (-1 is padding), or [query, ways] values.
        support_weights: [support] weight of each support example; None means all 1.
    """

    support_features: Float[Array, "support features"]
    support_targets: Shaped[Array, "*support_targets"]
    query_features: Float[Array, "query features"]
    query_targets: Shaped[Array, "*query_targets"]
    support_weights: Float[Array, " support"] | None = None


@dataclass(frozen=True)
class LinearHead:
    """A task's losses as functions of the logits: what the methods in sample space work with.

    Attributes:
        features: [support, features + 1] X̃.
        query_features: [query, features + 1] X̃ of the query.
        support_loss: logits [support, ways] -> ℓ.
        query_loss: logits [query, ways] -> (f, aux).
        ridge: the strength of the quadratic penalty.
    """

    features: Float[Array, "support augmented"]
    query_features: Float[Array, "query augmented"]
    support_loss: Callable[[Array], Scalar]
    query_loss: Callable[[Array], tuple[Scalar, Any]]
    ridge: Scalar


def augmented(features: Float[Array, "n features"]) -> Float[Array, "n augmented"]:
    """X̃ = [X, 1], in float32 at least.

    Example:
        >>> augmented(jnp.array([[2.0, 3.0]])).tolist()
        [[2.0, 3.0, 1.0]]
    """
    features = features.astype(trees.accumulator(features.dtype))
    return jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)


def stacked(params: HeadParams) -> Float[Array, "augmented ways"]:
    """Φ = [kernel; bias] as one matrix, in float32 at least."""
    matrix = jnp.concatenate([params["kernel"], params["bias"][None]])
    return matrix.astype(trees.accumulator(matrix.dtype))


def unstacked(matrix: Float[Array, "augmented ways"], like: HeadParams) -> HeadParams:
    """The inverse of `stacked`, in the dtype of `like`."""
    found = {"kernel": matrix[:-1], "bias": matrix[-1]}
    return jax.tree.map(lambda new, old: new.astype(old.dtype), found, like)


def _logits(params: HeadParams, features: Array) -> Array:
    dtype = trees.accumulator(features.dtype)
    kernel, bias = params["kernel"].astype(dtype), params["bias"].astype(dtype)
    return features.astype(dtype) @ kernel + bias


def _penalty(params: HeadParams, ridge: Any, dtype: Any) -> Scalar:
    squares = sum(jnp.sum(p.astype(dtype) ** 2) for p in (params["kernel"], params["bias"]))
    return 0.5 * jnp.asarray(ridge).astype(dtype) * squares


def _mean(losses: Float[Array, " n"], weights: Float[Array, " n"] | None) -> Scalar:
    return jnp.sum(losses * _shares(losses, weights))


def _shares(like: Float[Array, " n"], weights: Float[Array, " n"] | None) -> Float[Array, " n"]:
    """w_i / Σ w, which is 1/n without weights."""
    if weights is None:
        return jnp.full_like(like, 1 / like.shape[0])
    weights = weights.astype(like.dtype)
    return weights / jnp.maximum(jnp.sum(weights), jnp.finfo(like.dtype).tiny)


def _weights(targets: Array, weights: Array | None = None) -> Float[Array, " n"] | None:
    """The weights of the examples, 0 for padding: integer targets of -1."""
    if trees.is_inexact(targets):
        return weights
    present = (targets >= 0).astype(jnp.float32)
    return present if weights is None else present.astype(weights.dtype) * weights


def _support_weights(context: HeadContext) -> Float[Array, " n"] | None:
    return _weights(context.support_targets, context.support_weights)


def _cross_entropies(logits: Array, targets: Array) -> Float[Array, " n"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))


def _squared_errors(logits: Array, targets: Array) -> Float[Array, " n"]:
    if not trees.is_inexact(targets):
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return 0.5 * jnp.sum((logits - targets.astype(logits.dtype)) ** 2, axis=-1)


def _accuracy(logits: Array, targets: Array) -> Scalar:
    weights = _weights(targets)
    if trees.is_inexact(targets):
        targets = jnp.argmax(targets, axis=-1)
    return _mean((jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype), weights)


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
    return _inner_loss(_cross_entropies, params, context, ridge)


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
    return _outer_loss(_cross_entropies, params, context)


def squared_inner_loss(params: HeadParams, context: HeadContext, ridge: Any) -> Scalar:
    """Half the mean squared error on the support examples plus ridge/2 · ‖Φ‖².

    Arguments as for `softmax_inner_loss`; integer targets stand for their one-hot vectors.
    """
    return _inner_loss(_squared_errors, params, context, ridge)


def squared_outer_loss(
    params: HeadParams, context: HeadContext
) -> tuple[Scalar, dict[str, Scalar]]:
    """Half the mean squared error on the query examples, and the accuracy of the largest output."""
    return _outer_loss(_squared_errors, params, context)


def _inner_loss(losses: Callable, params: HeadParams, context: HeadContext, ridge: Any) -> Scalar:
    logits = _logits(params, context.support_features)
    mean = _mean(losses(logits, context.support_targets), _support_weights(context))
    return mean + _penalty(params, ridge, logits.dtype)


def _outer_loss(losses: Callable, params: HeadParams, context: HeadContext) -> tuple:
    logits = _logits(params, context.query_features)
    loss = _mean(losses(logits, context.query_targets), _weights(context.query_targets))
    return loss, {"accuracy": _accuracy(logits, context.query_targets)}


def largest_eigenvalue_bound(gram: Float[Array, "n n"]) -> Scalar:
    r"""A bound from above on the largest eigenvalue of a positive semi-definite matrix.

    $$\lambda_{\max} \le \big(\operatorname{tr} G^{p}\big)^{1/p} \le n^{1/p} \lambda_{\max},
      \qquad p = 2^5$$

    by repeated squaring: matrix products only, no eigensolver on the device; at most 16 % above
    for n = 100.

    Args:
        gram: [n, n], symmetric, positive semi-definite.

    Returns:
        The bound.

    Example:
        >>> round(float(largest_eigenvalue_bound(jnp.diag(jnp.array([3.0, 1.0])))), 3)
        3.0
    """
    tiny = jnp.finfo(gram.dtype).tiny
    scale = jnp.maximum(jnp.trace(gram), tiny)
    power, log_scale = gram / scale, jnp.log(scale)
    for k in range(1, SQUARINGS + 1):
        power = jnp.matmul(power, power, precision=jax.lax.Precision.HIGHEST)
        # tr Gᵖ of a matrix of trace 1 is at least n^(1-p): divided out so that it cannot underflow
        trace = jnp.maximum(jnp.trace(power), tiny)
        power, log_scale = power / trace, log_scale + jnp.log(trace) / 2**k
    rounding = 1 + 2 * gram.shape[0] * float(jnp.finfo(gram.dtype).eps)
    return jnp.exp(log_scale) * rounding


def smoothness_bound(context: HeadContext, ridge: Any) -> Scalar:
    r"""L with ∂²g ⪯ L·I for the softmax head, whatever its parameters.

    $$L = \tfrac12 \lambda_{\max}\big(\textstyle\sum_i \frac{w_i}{\sum_j w_j}
      \tilde x_i \tilde x_i^\top\big) + \text{ridge}$$

    because diag(p) − ppᵀ ⪯ ½ I. λmax by `largest_eigenvalue_bound`: L is rigorous up to
    rounding.

    Args:
        context: of one task.
        ridge: as in `softmax_inner_loss`.

    Returns:
        L, in float32 at least.

    Example:
        >>> context = HeadContext(jnp.zeros((4, 2)), jnp.arange(4), jnp.eye(2), jnp.arange(2))
        >>> round(float(smoothness_bound(context, 0.1)), 3)
        0.6
    """
    return 0.5 * _largest_curvature(context) + ridge


def squared_smoothness_bound(context: HeadContext, ridge: Any) -> Scalar:
    """L with ∂²g ⪯ L·I for the squared loss: as `smoothness_bound` without the factor ½."""
    return _largest_curvature(context) + ridge


def _largest_curvature(context: HeadContext) -> Scalar:
    features = augmented(context.support_features)
    shares = _shares(features[:, 0], _support_weights(context))
    features = features * jnp.sqrt(shares)[:, None]
    if features.shape[0] > features.shape[1]:
        features = features.T
    return largest_eigenvalue_bound(
        jnp.matmul(features, features.T, precision=jax.lax.Precision.HIGHEST)
    )


def ridge_solution(context: HeadContext, ridge: Any, ways: int) -> HeadParams:
    r"""The minimiser of `squared_inner_loss` in closed form, in the smaller of the two spaces.

    $$\Phi^* = \tilde X^\top S^{1/2}
      (S^{1/2} \tilde X \tilde X^\top S^{1/2} + \text{ridge}\, I)^{-1} S^{1/2} Y,
      \qquad S = \mathrm{diag}(w_i / \textstyle\sum_j w_j)$$

    Args:
        context: of one task.
        ridge: scalar, positive.
        ways: outputs of the head, for integer targets.

    Returns:
        The head's parameters, in float32 at least.

    Source: Bertinetto, Henriques, Torr, Vedaldi (ICLR 2019), equation 4 (R2-D2).

    Example:
        >>> context = HeadContext(jnp.eye(2), jnp.arange(2), jnp.eye(2), jnp.arange(2))
        >>> params = ridge_solution(context, 0.1, ways=2)
        >>> gradient = jax.grad(squared_inner_loss)(params, context, 0.1)
        >>> bool(trees.norm(gradient) < 1e-6)
        True
    """
    features, targets = augmented(context.support_features), context.support_targets
    if not trees.is_inexact(targets):
        targets = jax.nn.one_hot(targets, ways, dtype=features.dtype)
    roots = jnp.sqrt(_shares(features[:, 0], _support_weights(context)))[:, None]
    scaled, targets = features * roots, targets.astype(features.dtype) * roots
    ridge = jnp.asarray(ridge).astype(features.dtype)

    def solve(matrix: Array, right: Array) -> Array:
        shifted = matrix + ridge * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
        return jax.scipy.linalg.solve(shifted, right, assume_a="pos")

    if scaled.shape[0] <= scaled.shape[1]:
        matrix = scaled.T @ solve(scaled @ scaled.T, targets)
    else:
        matrix = solve(scaled.T @ scaled, scaled.T @ targets)
    return {"kernel": matrix[:-1], "bias": matrix[-1]}


def _describe(losses: Callable, context: HeadContext, ridge: Any) -> LinearHead:
    def query_loss(logits: Array) -> tuple[Scalar, dict[str, Scalar]]:
        loss = _mean(losses(logits, context.query_targets), _weights(context.query_targets))
        return loss, {"accuracy": _accuracy(logits, context.query_targets)}

    features = augmented(context.support_features)
    return LinearHead(
        features,
        augmented(context.query_features),
        lambda logits: _mean(losses(logits, context.support_targets), _support_weights(context)),
        query_loss,
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
    losses = (softmax_inner_loss, softmax_outer_loss, smoothness_bound, _cross_entropies)
    return _head_problem(losses, embed, init, ridge)


def squared_problem(
    embed: Callable[[MetaParams, Batch], HeadContext],
    init: Callable[[MetaParams], Params],
    ridge: float,
) -> Problem:
    """The same with squared losses, arguments as for `softmax_problem`."""
    losses = (squared_inner_loss, squared_outer_loss, squared_smoothness_bound, _squared_errors)
    return _head_problem(losses, embed, init, ridge)


def _head_problem(losses: tuple, embed: Callable, init: Callable, ridge: float) -> Problem:
    if ridge < 0:
        raise ValueError(f"ridge: expected 0 or more, found {ridge}.")
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
        head=lambda context: _describe(by_logits, context, ridge),
    )

"""Losses example by example, and their means over the examples that are no padding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from memmeta import trees
from memmeta.problem import Scalar


def present(targets: Shaped[Array, "n ..."]) -> Float[Array, " n"]:
    """The weight of each example: 0 for padding (integer targets of -1), otherwise 1.

    Example:
        >>> present(jnp.array([0, 1, -1])).tolist()
        [1.0, 1.0, 0.0]
    """
    if trees.is_inexact(targets):
        return jnp.ones(targets.shape[0], jnp.float32)
    return (targets >= 0).astype(jnp.float32)


def shares(weights: Float[Array, " n"], dtype: DTypeLike) -> Float[Array, " n"]:
    """w_i / Σ w; all 0 where nothing has weight.

    Example:
        >>> shares(jnp.array([1.0, 3.0, 0.0]), jnp.float32).tolist()
        [0.25, 0.75, 0.0]
    """
    weights = weights.astype(dtype)
    return weights / jnp.maximum(jnp.sum(weights), jnp.finfo(dtype).tiny)


def weighted_mean(values: Float[Array, " n"], weights: Float[Array, " n"]) -> Scalar:
    """Σ w_i x_i / Σ w; 0 where nothing has weight."""
    return jnp.sum(values * shares(weights, values.dtype))


def as_values(
    targets: Shaped[Array, "n ..."], ways: int, dtype: DTypeLike
) -> Float[Array, "n ways"]:
    """Targets as values: of integers their one-hot vectors, of padding zeros.

    Example:
        >>> as_values(jnp.array([1, -1]), 2, jnp.float32).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    if not trees.is_inexact(targets):
        targets = jax.nn.one_hot(targets, ways, dtype=dtype)
    return targets.astype(dtype)


def cross_entropies(
    logits: Float[Array, "n ways"], targets: Int[Array, " n"]
) -> Float[Array, " n"]:
    """−log softmax(logits)[target], example by example; of padding a finite number."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))


def squared_errors(
    outputs: Float[Array, "n ways"], targets: Shaped[Array, "n ..."]
) -> Float[Array, " n"]:
    """½ ‖output − target‖²; integer targets stand for their one-hot vectors."""
    values = as_values(targets, outputs.shape[-1], outputs.dtype)
    return 0.5 * jnp.sum((outputs - values) ** 2, axis=-1)


def accuracy(logits: Float[Array, "n ways"], targets: Shaped[Array, "n ..."]) -> Scalar:
    """Share of the examples whose largest output is the target's; padding does not count."""
    weights = present(targets)
    if trees.is_inexact(targets):
        targets = jnp.argmax(targets, axis=-1)
    right = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    return weighted_mean(right.astype(logits.dtype), weights)


def judged(
    losses: Callable[[Array, Array], Array],
    logits: Float[Array, "n ways"],
    targets: Shaped[Array, "n ..."],
) -> tuple[Scalar, dict[str, Scalar]]:
    """The mean loss and {"accuracy": ...}; padding does not count.

    Args:
        losses: `cross_entropies` or `squared_errors`.
        logits: of the query examples.
        targets: theirs.
    """
    loss = weighted_mean(losses(logits, targets), present(targets))
    return loss, {"accuracy": accuracy(logits, targets)}

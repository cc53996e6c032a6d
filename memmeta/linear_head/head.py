"""A linear head: what it needs of a task, and its parameters as one matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from memmeta import trees
from memmeta.linear_head.examples import present
from memmeta.problem import Scalar

HeadParams: TypeAlias = dict[str, Float[Array, "..."]]
"""{"kernel": [features, ways], "bias": [ways]}."""


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

    @property
    def weights(self) -> Float[Array, " support"]:
        """Of the support examples: `support_weights`, and 0 for padding."""
        there = present(self.support_targets)
        if self.support_weights is None:
            return there
        return there.astype(self.support_weights.dtype) * self.support_weights


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

"""A linear head: what it needs of a task, and its parameters as one matrix."""

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from memmeta._shared import trees
from memmeta.few_shot._examples import present

HeadParams: TypeAlias = dict[str, Float[Array, "..."]]
"""{"kernel": [features, ways], "bias": [ways]}."""


class HeadContext(NamedTuple):
    """What the losses of a linear head need of one task.

    Attributes:
        support_features: [support, features], floating point; for another than a linear head any
            pytree of arrays [support, ...].
        support_targets: [support] class indices (int32; -1 is padding and has no weight), or
            [support, ways] values (squared loss).
        query_features: [query, features].
        query_targets: [query] class indices (-1 is padding), or [query, ways] values.
        support_weights: [support] weight of each support example; None means all 1.
    """

    support_features: PyTree[Float[Array, "support ..."]]
    support_targets: Shaped[Array, "*support_targets"]
    query_features: PyTree[Float[Array, "query ..."]]
    query_targets: Shaped[Array, "*query_targets"]
    support_weights: Float[Array, " support"] | None = None

    @property
    def weights(self) -> Float[Array, " support"]:
        """Of the support examples: `support_weights`, and 0 for padding."""
        there = present(self.support_targets)
        if self.support_weights is None:
            return there
        return there.astype(self.support_weights.dtype) * self.support_weights


def augmented(features: Float[Array, "n features"]) -> Float[Array, "n augmented"]:
    """X̃ = [X, 1], in float32 at least.

    Example:
        >>> augmented(jnp.array([[2.0, 3.0]])).tolist()
        [[2.0, 3.0, 1.0]]
    """
    features = features.astype(trees.accumulator(features.dtype))
    return jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)

"""The loss of each example, and means over the examples that are not padding."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from memmeta._shared import trees
from memmeta.problem import Scalar

Loss: TypeAlias = Callable[[Array, Array], Float[Array, " n"]]
"""(outputs [n, ways], targets [n, ...]) -> the loss of each example, of the user's own. The outputs
are what the network's head gives: with a loss of one's own any pytree."""
Losses: TypeAlias = Callable[[Array, Array, Array], Float[Array, " n"]]
"""(outputs, targets, which outputs stand for a class of the task) -> the loss of each example."""


def present(targets: Shaped[Array, "n ..."]) -> Float[Array, " n"]:
    """The weight of each example: 0 for padding (integer targets of -1), otherwise 1.

    Example:
        >>> present(jnp.array([0, 1, -1])).tolist()
        [1.0, 1.0, 0.0]
    """
    if trees.is_inexact(targets):
        return jnp.ones(targets.shape[0], jnp.float32)
    return jnp.all(targets.reshape(targets.shape[0], -1) >= 0, axis=1).astype(jnp.float32)


def are_classes(targets: Shaped[Array, "n ..."]) -> bool:
    """Whether targets are class indices: integers, one an example."""
    return not trees.is_inexact(targets) and targets.ndim == 1


def shares(weights: Float[Array, " n"], dtype: DTypeLike) -> Float[Array, " n"]:
    """w_i / Σ w; all 0 where nothing has weight.

    Example:
        >>> shares(jnp.array([1.0, 3.0, 0.0]), jnp.float32).tolist()
        [0.25, 0.75, 0.0]
    """
    weights = weights.astype(dtype)
    return weights / jnp.maximum(jnp.sum(weights), jnp.finfo(dtype).tiny)


def weighted_mean(values: Float[Array, " n"], weights: Float[Array, " n"]) -> Scalar:
    """Σ w_i x_i / Σ w; 0 where nothing has weight. What has no weight may be anything."""
    return jnp.sum(jnp.where(weights > 0, values, 0) * shares(weights, values.dtype))


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


def ways_of(outputs: PyTree) -> int:
    """How many outputs there are of an example; 0 where they are no matrix.

    Example:
        >>> ways_of(jnp.zeros((7, 3))), ways_of({"mean": jnp.zeros(7)})
        (3, 0)
    """
    is_matrix = isinstance(outputs, jax.Array) and outputs.ndim == 2
    return outputs.shape[1] if is_matrix else 0


def classes_of(targets: Shaped[Array, "n ..."], ways: int) -> Bool[Array, " ways"]:
    """Which outputs stand for a class of the task; all of them where targets are no classes.

    Example:
        >>> classes_of(jnp.array([0, 2, -1]), 3).tolist()
        [True, False, True]
    """
    if not are_classes(targets):
        return jnp.ones(ways, bool)
    return jnp.any(jax.nn.one_hot(targets, ways, dtype=bool), axis=0)


def cross_entropies(
    outputs: Float[Array, "n ways"], targets: Int[Array, " n"], classes: Bool[Array, " ways"]
) -> Float[Array, " n"]:
    """−log softmax(outputs)[target] over the task's own classes; infinite for any other target."""
    logits = jnp.where(classes, outputs, -jnp.inf)
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return losses


def squared_errors(
    outputs: Float[Array, "n ways"],
    targets: Shaped[Array, "n ..."],
    classes: Bool[Array, " ways"],
) -> Float[Array, " n"]:
    """½ ‖output − target‖²; integer targets stand for their one-hot vectors."""
    values = as_values(targets, outputs.shape[-1], outputs.dtype)
    return 0.5 * jnp.sum(jnp.where(classes, outputs - values, 0) ** 2, axis=-1)


def by_targets(
    outputs: Float[Array, "n ways"],
    targets: Shaped[Array, "n ..."],
    classes: Bool[Array, " ways"],
) -> Float[Array, " n"]:
    """Cross-entropies of integer targets, squared errors of floating-point ones."""
    losses = squared_errors if trees.is_inexact(targets) else cross_entropies
    return losses(outputs, targets, classes)


def of_examples(loss: Loss | None) -> Losses:
    """A user's loss with the signature of `Losses`, the classes ignored; `by_targets` for None.

    Raises:
        ValueError: (when traced) the loss gives something else than one value an example.
    """
    if loss is None:
        return by_targets

    def one_each(outputs: PyTree, targets: Array, classes: Array) -> Array:
        values = jnp.asarray(loss(outputs, targets))
        # [n, 1] would be multiplied with weights [n] to [n, n], n times too much without a word
        if values.shape != targets.shape[:1] or not trees.is_inexact(values):
            raise ValueError(
                f"loss: returned {values.dtype}{list(values.shape)}, expected "
                f"float32{list(targets.shape[:1])}, one value an example. Sum or average over the "
                "other axes, for instance by .sum(-1)."
            )
        return values

    return one_each


def support_mean(losses: Losses, outputs: PyTree, targets: Shaped[Array, "n ..."]) -> Scalar:
    """The mean loss of the support examples; padding does not count.

    Example:
        >>> round(float(support_mean(by_targets, jnp.zeros((3, 2)), jnp.array([0, 1, -1]))), 4)
        0.6931
    """
    values = losses(outputs, targets, classes_of(targets, ways_of(outputs)))
    return weighted_mean(values, present(targets))


def query_mean(
    losses: Losses,
    outputs: PyTree,
    targets: Shaped[Array, "n ..."],
    support_targets: Shaped[Array, "m ..."],
) -> tuple[Scalar, dict[str, Scalar]]:
    """The mean loss, and {"accuracy": ...} where there are classes; padding does not count.

    Both are not-a-number for a task that has no example to adapt on or to evaluate on, or a label
    that no output stands for: its meta-step leaves it out and counts it.
    """
    ways = ways_of(outputs)
    classes = classes_of(support_targets, ways)
    loss = weighted_mean(losses(outputs, targets, classes), present(targets))
    sound = _readable(support_targets, ways) & _readable(targets, ways)
    loss = jnp.where(sound & jnp.isfinite(loss), loss, jnp.nan)
    if not are_classes(targets) or not ways:
        return loss, {}
    chosen = jnp.argmax(jnp.where(classes, outputs, -jnp.inf), axis=-1)
    right = chosen.astype(targets.dtype) == targets
    accuracy = weighted_mean(right.astype(loss.dtype), present(targets))
    return loss, {"accuracy": jnp.where(jnp.isfinite(loss), accuracy, jnp.nan)}


def _readable(targets: Shaped[Array, "n ..."], ways: int) -> Bool[Array, ""]:
    """Whether there is an example, and every label is one of the outputs' or padding."""
    some = jnp.any(present(targets) > 0)
    if not are_classes(targets) or not ways:
        return some
    return some & jnp.all((targets >= -1) & (targets < ways))

r"""Data hyper-cleaning: θ_i is the logit of example i's weight.

g(θ, φ) = mean_i σ(θ_i) ℓ(φ; x_i, ỹ_i) + ρ/2 ‖φ‖²,    f(φ) = mean_j ℓ(φ; x_j', y_j')
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

import memmeta as mm
from benchmarks.hyper_cleaning.data import CLASSES, SIDE, Rows
from memmeta.inner import minibatch

Model: TypeAlias = Literal["linear", "network"]
HIDDEN, RIDGE = 300, 2e-3  # ρ/2 = 0.001 as in the literature
FINAL_STEPS, FINAL_ROWS, FINAL_RATE = 3000, 100, 1e-3


class Context(NamedTuple):
    """What the losses see."""

    train: Rows
    weights: Array  # σ(θ), of the training examples
    validation: Rows


def start(model: Model, key: Array) -> Any:
    """φ₀: zero, or a network of one hidden layer by He's rule."""
    if model == "linear":
        return {"kernel": jnp.zeros((SIDE**2, CLASSES)), "bias": jnp.zeros(CLASSES)}
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (SIDE**2, HIDDEN)) * (2 / SIDE**2) ** 0.5,
        "hidden_bias": jnp.zeros(HIDDEN),
        "kernel": jax.random.normal(second, (HIDDEN, CLASSES)) * (1 / HIDDEN) ** 0.5,
        "bias": jnp.zeros(CLASSES),
    }


def logits(phi: Any, inputs: Array | np.ndarray) -> Array:
    """[rows, 10], of either model; softplus, which has a second derivative."""
    if "hidden" in phi:
        features = jax.nn.softplus(inputs @ phi["hidden"] + phi["hidden_bias"]) - jnp.log(2.0)
    else:
        features = jnp.asarray(inputs)
    return features @ phi["kernel"] + phi["bias"]


def losses(phi: Any, rows: Rows) -> Array:
    """Cross-entropy of each row."""
    outputs = logits(phi, rows.inputs)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, rows.labels)


def problem(model: Model) -> mm.Problem:
    """The bilevel problem of one task, which is (training rows, validation rows)."""

    def inner_loss(phi: Any, context: Context) -> Array:
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(phi))
        return jnp.mean(context.weights * losses(phi, context.train)) + RIDGE / 2 * squares

    def outer_loss(phi: Any, context: Context) -> tuple[Array, dict]:
        return jnp.mean(losses(phi, context.validation)), {}

    return mm.Problem(
        embed=lambda theta, task: Context(task[0], jax.nn.sigmoid(theta), task[1]),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        init=lambda theta: start(model, jax.random.key(0)),
    )


def drawn(rows: int) -> Callable[[Any, Array, Array], Any]:
    """So many training rows, with their weights, and as many validation rows."""
    train = minibatch(rows, of=lambda path: path.startswith(("train", "weights")))
    validation = minibatch(rows, of=lambda path: path.startswith("validation"))

    def view(context: Context, key: Array, step: Array) -> Context:
        return validation(train(context, key, step), jax.random.fold_in(key, 1), step)

    return view


def trained(model: Model, rows: Rows, weights: Array, key: Array) -> Any:
    """φ trained anew with given weights, the same way for every row of the table."""
    schedule = optax.cosine_decay_schedule(FINAL_RATE, FINAL_STEPS)
    view = minibatch(FINAL_ROWS, of=lambda path: path.startswith(("train", "weights")))
    inner = mm.InnerLoop(optax.adam(schedule), FINAL_STEPS, view=view)
    context = Context(jax.tree.map(jnp.asarray, rows), weights, jax.tree.map(jnp.asarray, rows))
    # Weights of mean one: the ridge then means the same in every row.
    context = context._replace(weights=weights / jnp.mean(weights))
    return _run(inner, model, context, start(model, key), key)


def _run(inner: mm.InnerLoop, model: Model, context: Context, phi: Any, key: Array) -> Any:
    return jax.jit(lambda c, p, k: inner(problem(model), p, c, k))(context, phi, key)


def accuracy(phi: Any, rows: Rows) -> float:
    """Share of the rows whose largest output is at their label."""
    return float(np.mean(np.argmax(logits(phi, rows.inputs), axis=-1) == rows.labels))


def f1(weights: np.ndarray, corrupted: Bool[np.ndarray, " rows"]) -> float:
    """Of finding the wrong labels: those whose weight fell below the ½ that it began with."""
    called = weights < 0.5
    hits = np.sum(called & corrupted)
    return float(2 * hits / max(1, np.sum(called) + np.sum(corrupted)))

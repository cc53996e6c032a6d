"""The implicit methods through jaxopt: its implicit differentiation, XLA's own convolution."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array

from benchmarks.workloads import CG_STEPS, PROXIMAL, RATE, RIDGE


def body(params: Any, images: Array) -> Array:
    """Conv4 as one writes it without this library."""
    for name in sorted(params):
        block = params[name]
        images = lax.conv_general_dilated(
            images, block["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, variance = images.mean((0, 1, 2)), images.var((0, 1, 2))
        images = (images - mean) * lax.rsqrt(variance + 1e-5) * block["scale"] + block["bias"]
        window = (1, 2, 2, 1)
        images = lax.reduce_window(jax.nn.relu(images), -jnp.inf, lax.max, window, window, "VALID")
    return images.reshape(len(images), -1)


def _cross_entropy(head: Any, features: Array, labels: Array) -> Array:
    logits = features @ head["kernel"] + head["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _half_square(tree: Any) -> Array:
    return sum((0.5 * jnp.sum(x**2) for x in jax.tree.leaves(tree)), jnp.float32(0))


def _solver(inner: Callable, steps: int, products: int) -> Any:
    jaxopt: Any = importlib.import_module("jaxopt")
    solve = partial(jaxopt.linear_solve.solve_cg, maxiter=products, tol=0.0)
    return jaxopt.GradientDescent(
        inner, maxiter=steps, stepsize=RATE, acceleration=False, tol=0.0, implicit_diff_solve=solve
    )


def memory_reduced(steps: int, products: int) -> Callable:
    """A head from zero on features computed once; (θ, task) -> query loss."""

    def inner(head: Any, features: Array, labels: Array) -> Array:
        return _cross_entropy(head, features, labels) + RIDGE * _half_square(head)

    solver = _solver(inner, steps, products)

    def loss(theta: Any, task: Any) -> Array:
        both = body(theta["body"], jnp.concatenate([task.support_inputs, task.query_inputs]))
        support, query = jnp.split(both, [len(task.support_inputs)])
        start = jax.tree.map(jnp.zeros_like, theta["head"])
        head = solver.run(start, support, task.support_targets).params
        return _cross_entropy(head, query, task.query_targets)

    return loss


def imaml(steps: int, products: int) -> Callable:
    """Everything adapts, held to θ; (θ, task) -> query loss."""

    def whole(phi: Any, images: Array, labels: Array) -> Array:
        return _cross_entropy(phi["head"], body(phi["body"], images), labels)

    def inner(phi: Any, theta: Any, task: Any) -> Array:
        pull = _half_square(jax.tree.map(jnp.subtract, phi, theta))
        return whole(phi, task.support_inputs, task.support_targets) + PROXIMAL * pull

    solver = _solver(inner, steps, products)

    def loss(theta: Any, task: Any) -> Array:
        phi = solver.run(lax.stop_gradient(theta), theta, task).params
        return whole(phi, task.query_inputs, task.query_targets)

    return loss


METHODS: dict[str, tuple[Callable[[int, int], Callable], int]] = {
    "imaml": (imaml, CG_STEPS),
    "memory_reduced": (memory_reduced, 20),
}


def meta_step(
    method: str, params: Any, tasks: Any, steps: int
) -> Callable[[], tuple[float, float]]:
    """A function that makes one meta-step with Adam: (mean query loss, gradient norm)."""
    make, products = METHODS[method]
    loss, optimizer = make(steps, products), optax.adam(1e-3)

    def mean(theta: Any) -> Array:
        return lax.map(lambda task: loss(theta, task), tasks).mean()

    @jax.jit
    def update(theta: Any, state: Any) -> tuple:
        value, gradient = jax.value_and_grad(mean)(theta)
        updates, state = optimizer.update(gradient, state, theta)
        return optax.apply_updates(theta, updates), state, value, optax.tree.norm(gradient)

    kept = [params, optimizer.init(params)]

    def step() -> tuple[float, float]:
        kept[0], kept[1], value, norm = update(*kept)
        return float(value), float(norm)

    return step

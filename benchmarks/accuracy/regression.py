r"""Regression by the literature's methods, and a Gaussian process to compare them with.

A method keeps who adapts, its inner loop and its estimator; its cross-entropies become

    g, f = ½ mean (prediction − target)²   (+ the ridge or the proximal term of the method)
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memmeta.few_shot import HeadContext, ridge_solution, squared_problem
from memmeta.few_shot.algorithms import METHODS, Learner
from memmeta.models import Network
from memmeta.problem import MetaParams, Params, Problem, Scalar, Task

WITHOUT: dict[str, str] = {"protonet": "classifies by class means: a curve has no classes"}
"""Methods that make no sense for regression, and why."""

HEADS: dict[str, float] = {
    **dict.fromkeys(("memory_reduced", "stocbio", "amigo", "pzobo"), 0.1),
    **dict.fromkeys(("anil", "itd_bio"), 0.0),
}
"""Methods whose head adapts, with the ridge they have by default."""


def learner(method: str, network: Network, **options: Any) -> Learner:
    """A method of the literature with squared losses.

    The network's `ways` is the number of targets; the outer loss's auxiliary output is {"error":
    mean squared error}.

    Raises:
        ValueError: the method makes no sense for regression.
    """
    if method in WITHOUT:
        raise ValueError(f"method: {method} {WITHOUT[method]}.")
    made = METHODS[method](network, **options)
    given = made.problem
    if method in HEADS:
        ridge = options.get("ridge", HEADS[method])
        problem = squared_problem(given.embed, given.init, ridge)
        outer = problem.outer_loss
        with_error = replace(problem, outer_loss=lambda p, c: _named(outer(p, c)[0]))
        return replace(made, problem=with_error)
    if method == "r2d2":
        return replace(made, problem=_ridge_regression(network), init=_ridge_init(network))
    return replace(made, problem=_whole(given, network, options.get("proximal", 2.0)))


def _named(loss: Scalar) -> tuple[Scalar, dict[str, Scalar]]:
    return loss, {"error": 2 * loss}


def _half_mean_square(found: Array, expected: Array) -> Scalar:
    return 0.5 * jnp.mean(jnp.sum((found - expected) ** 2, axis=-1))


def _whole(given: Problem, network: Network, proximal: float) -> Problem:
    """Any part of the network adapts; `given` says which, and where φ starts.

    The context is that of `memmeta.few_shot.network_problem`.
    """

    def predicted(params: Params, context: Any, inputs: Array) -> Array:
        merged = jax.tree.map(
            lambda a, b: b if a is None else a, params, context.rest, is_leaf=lambda x: x is None
        )
        features = network.body(merged["body"], inputs, jnp.ones(inputs.shape[0], jnp.float32))
        return network.head(merged["head"], features)

    def inner_loss(params: Params, context: Any) -> Scalar:
        task = context.task
        found = predicted(params, context, task.support_inputs)
        loss = _half_mean_square(found, task.support_targets)
        if context.anchor is None:
            return loss
        squares = jax.tree.map(lambda p, a: jnp.sum((p - a) ** 2), params, context.anchor)
        return loss + 0.5 * proximal * sum(jax.tree.leaves(squares))

    def outer_loss(params: Params, context: Any) -> tuple[Scalar, Any]:
        task = context.task
        found = predicted(params, context, task.query_inputs)
        return _named(_half_mean_square(found, task.query_targets))

    return Problem(given.embed, inner_loss, outer_loss, given.init)


def _ridge_regression(network: Network) -> Problem:
    """R2-D2 without the scale and the shift of the logits, which a regression does not need."""

    def embed(theta: MetaParams, task: Task) -> tuple[HeadContext, Array]:
        inputs = jnp.concatenate([task.support_inputs, task.query_inputs])
        features = network.body(theta["body"], inputs, jnp.ones(len(inputs), jnp.float32))
        support, query = jnp.split(features, [len(task.support_inputs)])
        context = HeadContext(support, task.support_targets, query, task.query_targets)
        return context, theta["log_ridge"]

    def outer_loss(params: Params, context: tuple[HeadContext, Array]) -> tuple[Scalar, Any]:
        head, log_ridge = context
        solution = ridge_solution(head, jnp.exp(log_ridge), network.ways)
        found = head.query_features @ solution["kernel"] + solution["bias"]
        return _named(_half_mean_square(found, head.query_targets))

    return Problem(embed, lambda params, context: jnp.float32(0), outer_loss, lambda theta: ())


def _ridge_init(network: Network) -> Callable[[Array], MetaParams]:
    return lambda key: {"body": network.init(key)["body"], "log_ridge": jnp.log(jnp.float32(0.1))}


LENGTHS = np.geomspace(0.05, 5.0, 40)
NOISES = np.geomspace(1e-5, 1e-1, 5)


def gaussian_process(task: Task) -> Float[Array, ""]:
    r"""The mean squared error of a Gaussian process that sees nothing but the support points.

    $$k(x, x') = \sigma^2 (e^{-(x - x')^2 / 2 \ell^2} + \epsilon \, [x = x'])$$

    Mean zero; ℓ and ε are those of the largest marginal likelihood on a grid, σ² its maximiser in
    closed form, yᵀ K⁻¹ y / n. Inputs and targets have one dimension.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), equations 2.25
    and 5.8.
    """
    x, y, points = task.support_inputs[:, 0], task.support_targets[:, 0], task.query_inputs[:, 0]

    def fitted(length: Array, noise: Array) -> tuple[Array, Array]:
        def kernel(a: Array, b: Array) -> Array:
            return jnp.exp(-0.5 * ((a[:, None] - b[None]) / length) ** 2)

        factor = jnp.linalg.cholesky(kernel(x, x) + noise * jnp.eye(x.size, dtype=x.dtype))
        weights = jax.scipy.linalg.cho_solve((factor, True), y)
        scale = jnp.maximum(y @ weights / x.size, 1e-12)
        likelihood = -0.5 * x.size * jnp.log(scale) - jnp.sum(jnp.log(jnp.diag(factor)))
        likelihood = jnp.where(jnp.isfinite(likelihood), likelihood, -jnp.inf)
        return likelihood, kernel(points, x) @ weights

    grids = np.meshgrid(LENGTHS, NOISES)
    lengths, noises = (jnp.asarray(grid.ravel(), x.dtype) for grid in grids)
    likelihoods, predictions = jax.vmap(fitted)(lengths, noises)
    best = predictions[jnp.argmax(likelihoods)]
    return jnp.mean((best - task.query_targets[:, 0]) ** 2)

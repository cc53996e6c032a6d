r"""Two stochastic bilevel problems with many samples, whose F(θ) is known to rounding.

Those of the public benchmark of Dagréou et al. (2022): a quadratic in 100 + 100 dimensions with
Hessians between 0.1 and 1, and logistic regression with one ridge a feature, 22 of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.optimize import minimize
from scipy.special import expit

import memmeta as mm

DIM, FEATURES = 100, 22
NEWTON, SMALL = 30, 1e-10


class Context(NamedTuple):
    """What the losses see: θ, and rows of the two sets of samples."""

    theta: Array
    train: Any
    validation: Any


class Example(NamedTuple):
    """A problem and its data.

    Attributes:
        problem: of one task, which is (training rows, validation rows).
        theta: where θ starts.
        data: the task.
        value: θ -> F(θ), in float64.
        best: min F.
    """

    problem: mm.Problem
    theta: Array
    data: tuple[Any, Any]
    value: Callable[[np.ndarray], float]
    best: float


class Terms(NamedTuple):
    """Sample i of the quadratic: ½ (aᵀφ)² + ½ (hᵀθ)² + (uᵀθ)(wᵀφ) + bᵀφ + dᵀθ."""

    a: Array
    h: Array
    u: Array
    w: Array
    b: Array
    d: Array


def quadratic(samples: int) -> Example:
    """Mean inner Hessian between 0.1 and 1; the minimum of F in closed form."""
    parts = [_terms(key, samples) for key in jax.random.split(jax.random.key(0))]

    def loss(phi: Array, theta: Array, rows: Terms) -> Array:
        squares = 0.5 * (rows.a @ phi) ** 2 + 0.5 * (rows.h @ theta) ** 2
        cross = (rows.u @ theta) * (rows.w @ phi)
        return jnp.mean(squares + cross + rows.b @ phi + rows.d @ theta)

    g, f = (_matrices(part) for part in parts)
    to_phi, at_zero = -np.linalg.solve(g["aa"], g["wu"]), -np.linalg.solve(g["aa"], g["b"])

    def value(theta: np.ndarray) -> float:
        phi = to_phi @ theta + at_zero
        squares = 0.5 * phi @ f["aa"] @ phi + 0.5 * theta @ f["hh"] @ theta
        return float(squares + phi @ f["wu"] @ theta + f["b"] @ phi + f["d"] @ theta)

    hessian = to_phi.T @ f["aa"] @ to_phi + f["hh"] + to_phi.T @ f["wu"] + f["wu"].T @ to_phi
    slope = to_phi.T @ (f["aa"] @ at_zero + f["b"]) + f["wu"].T @ at_zero + f["d"]
    best = value(-np.linalg.solve(hessian, slope))
    problem = _problem(loss, lambda phi, theta, rows: loss(phi, theta, rows), DIM)
    return Example(problem, jnp.ones(DIM), (parts[0], parts[1]), value, best)


def _terms(key: Array, samples: int) -> Terms:
    keys = jax.random.split(key, 8)

    def drawn(index: int, low: float, high: float) -> Array:
        """Samples of N(0, U diag(low … high) Uᵀ)."""
        turn = jnp.linalg.qr(jax.random.normal(keys[index], (DIM, DIM)))[0]
        spectrum = jnp.geomspace(low, high, DIM)
        normal = jax.random.normal(jax.random.fold_in(keys[index], 1), (samples, DIM))
        return (normal * spectrum**0.5) @ turn.T

    a, h = drawn(0, 0.1, 1.0), drawn(1, 0.1, 1.0)
    w = jax.random.normal(keys[2], (samples, DIM))
    turn = jnp.linalg.qr(jax.random.normal(keys[3], (DIM, DIM)))[0]
    u = (w * jnp.geomspace(0.01, 0.1, DIM)) @ turn.T  # the mean of w uᵀ has norm 0.1
    b, d = (0.5 + jax.random.normal(key, (samples, DIM)) for key in keys[4:6])
    return Terms(a, h, u, w, b, d)


def _matrices(rows: Terms) -> dict[str, np.ndarray]:
    a, h, u, w, b, d = (np.asarray(leaf, np.float64) for leaf in rows)
    count = len(a)
    products = {"aa": a.T @ a / count, "hh": h.T @ h / count, "wu": w.T @ u / count}
    return products | {"b": b.mean(axis=0), "d": d.mean(axis=0)}


class Labelled(NamedTuple):
    """Rows of the logistic regression, labels ±1."""

    inputs: Array
    labels: Array


def logistic(samples: int) -> Example:
    """g = mean log(1 + exp(−y xᵀφ)) + ½ Σ_j exp(θ_j) φ_j², f the same without the ridge.

    Made data with as many features as ijcnn1, of unequal scales, half of them without use. The
    minimum of F by BFGS on exact gradients.
    """
    keys = jax.random.split(jax.random.key(1), 4)
    scales = jnp.geomspace(0.1, 1.0, FEATURES)
    useful = jnp.arange(FEATURES) % 2 == 0
    true = jnp.where(useful, 2 * jax.random.normal(keys[0], (FEATURES,)), 0.0)

    def drawn(key: Array, count: int) -> Labelled:
        first, second = jax.random.split(key)
        inputs = scales * jax.random.normal(first, (count, FEATURES))
        chance = jax.nn.sigmoid(inputs @ true)
        return Labelled(inputs, jnp.where(jax.random.uniform(second, (count,)) < chance, 1.0, -1.0))

    def data_loss(phi: Array, theta: Array, rows: Labelled) -> Array:
        return jnp.mean(jax.nn.softplus(-rows.labels * (rows.inputs @ phi)))

    def inner_loss(phi: Array, theta: Array, rows: Labelled) -> Array:
        return data_loss(phi, theta, rows) + 0.5 * jnp.sum(jnp.exp(theta) * phi**2)

    data = drawn(keys[1], samples), drawn(keys[2], samples)
    problem = _problem(inner_loss, data_loss, FEATURES)
    value_and_gradient = exact_logistic(data)
    start = np.full(FEATURES, -2.0)
    found = minimize(value_and_gradient, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    value = lambda theta: value_and_gradient(theta)[0]  # noqa: E731
    return Example(problem, jnp.asarray(start, jnp.float32), data, value, float(found.fun))


def exact_logistic(
    data: tuple[Labelled, Labelled],
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """θ -> F and ∇F of the logistic regression, in NumPy and float64: Newton to φ*, then v."""
    train, validation = (tuple(np.asarray(leaf, np.float64) for leaf in rows) for rows in data)

    def loss(rows: tuple[np.ndarray, ...], phi: np.ndarray) -> float:
        inputs, labels = rows
        return float(np.mean(np.logaddexp(0, -labels * (inputs @ phi))))

    def derivatives(rows: tuple[np.ndarray, ...], phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slope and Hessian of it."""
        inputs, labels = rows
        wrong = expit(-labels * (inputs @ phi))  # the chance of the other label
        weighted = inputs * (wrong * (1 - wrong))[:, None]
        return -inputs.T @ (labels * wrong) / len(labels), weighted.T @ inputs / len(labels)

    def call(theta: np.ndarray) -> tuple[float, np.ndarray]:
        # A feature without use has its best θ at infinity, where a line search may look.
        ridge, phi = np.exp(np.minimum(theta, 300)), np.zeros(FEATURES)
        whole = lambda phi: loss(train, phi) + 0.5 * np.sum(ridge * phi**2)  # noqa: E731
        for _ in range(NEWTON):
            slope, hessian = derivatives(train, phi)
            change = np.linalg.solve(hessian + np.diag(ridge), slope + ridge * phi)
            while whole(phi - change) > whole(phi) and np.linalg.norm(change) > SMALL:
                change = change / 2
            phi = phi - change
            if np.linalg.norm(change) < SMALL:
                break
        hessian = derivatives(train, phi)[1] + np.diag(ridge)
        v = np.linalg.solve(hessian, derivatives(validation, phi)[0])
        return loss(validation, phi), -ridge * phi * v

    return call


def _problem(inner: Callable[..., Array], outer: Callable[..., Array], dim: int) -> mm.Problem:
    return mm.Problem(
        embed=lambda theta, task: Context(theta, *task),
        inner_loss=lambda phi, c: inner(phi, c.theta, c.train),
        outer_loss=lambda phi, c: (outer(phi, c.theta, c.validation), {}),
        init=lambda theta: jnp.zeros(dim, theta.dtype),
    )


def blocks(rows: int) -> Callable[[Context, Array, Array], Context]:
    """A view: so many rows in a row of each set, the block drawn anew in each step.

    The rows are independent draws already, so that no order of them need be made.
    """

    def view(context: Context, key: Array, step: Array) -> Context:
        draws = jax.random.split(jax.random.fold_in(key, step))
        count = jax.tree.leaves(context.train)[0].shape[0] // rows
        numbers = [jax.random.randint(draw, (), 0, count, jnp.int32) for draw in draws]
        return _cut(context, rows, *numbers)

    return view


def in_order(rows: int) -> Callable[[Context, Array, Array], Context]:
    """A view: block after block, the same of both sets, without a draw."""

    def view(context: Context, key: Array, step: Array) -> Context:
        number = step % (jax.tree.leaves(context.train)[0].shape[0] // rows)
        return _cut(context, rows, number, number)

    return view


def numbered(rows: int) -> Callable[[Context, Array, Array], Context]:
    """A view: block i of both sets, for methods that remember what they saw of it."""
    return lambda context, key, number: _cut(context, rows, number, number)


def _cut(context: Context, rows: int, train: Array, validation: Array) -> Context:
    def cut(tree: Any, number: Array) -> Any:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number * rows, rows), tree
        )

    return Context(context.theta, cut(context.train, train), cut(context.validation, validation))


PROBLEMS: dict[str, Callable[[int], Example]] = {"quadratic": quadratic, "logistic": logistic}
"""By name: number of samples of each set -> the problem."""

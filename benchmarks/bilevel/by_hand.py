"""The same algorithms written out: one scan body each, in φ, v and θ, without the library.

Each is (example, view, key, rates) -> (a first carry from θ, a body). They draw the same blocks as
the recipes, so that both go through the same numbers, and give the outer loss of each step, as the
recipes do in their metrics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.bilevel.problems import Context, Example


class Rates(NamedTuple):
    """Of one problem.

    Attributes:
        inner: ρ, of φ.
        linear: η, of v.
        outer: γ, of θ.
        average: α of MA-SOBA.
        delta: δ of F²SA.
        blocks: n of SABA.
    """

    inner: float
    linear: float
    outer: float
    average: float = 0.1
    delta: float = 0.1
    blocks: int = 1


OUTER = 2**31 - 5
"""What keeps the recipe's draws for θ apart from those for φ."""
View: TypeAlias = Callable[[Context, Array, Array], Context]
Loop: TypeAlias = tuple[Callable[[Array], Any], Callable[[Any], tuple[Any, Array]]]
"""θ -> carry, whose first entry is θ; carry -> (carry, f)."""


def soba(example: Example, view: View, key: Array, rates: Rates) -> Loop:
    """Dagréou et al. (2022), section 2."""

    def body(carry: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        theta, phi, v, k = carry
        seen = view(whole(example), key, k)
        (d_phi, d_v, d_theta), loss = directions(example, theta, phi, v, seen)
        phi, v = phi - rates.inner * d_phi, v - rates.linear * d_v
        return (theta - rates.outer * d_theta, phi, v, k + 1), loss

    return lambda theta: (theta, *zeros(example, theta, 2), jnp.int32(0)), body


def ma_soba(example: Example, view: View, key: Array, rates: Rates) -> Loop:
    """Chen, Xiao, Balasubramanian (2024), Algorithm 1."""

    def body(carry: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        theta, phi, v, h, k = carry
        seen = view(whole(example), key, k)
        (d_phi, d_v, d_theta), loss = directions(example, theta, phi, v, seen)
        phi, v = phi - rates.inner * d_phi, v - rates.linear * d_v
        h = (1 - rates.average) * h + rates.average * d_theta
        return (theta - rates.outer * h, phi, v, h, k + 1), loss

    return lambda theta: (theta, *zeros(example, theta, 2), 0 * theta, jnp.int32(0)), body


def saba(example: Example, view: View, key: Array, rates: Rates) -> Loop:
    """Dagréou et al. (2022), section 3.2; `view` takes the number of a block."""

    def first(theta: Array) -> tuple[Any, ...]:
        phi, v = zeros(example, theta, 2)
        mean = (phi, v, jnp.zeros_like(theta))
        table = jax.tree.map(lambda leaf: jnp.zeros((rates.blocks, *leaf.shape)), mean)
        return theta, phi, v, table, mean, jnp.int32(0)

    def body(carry: tuple[Any, ...]) -> tuple[tuple[Any, ...], Array]:
        theta, phi, v, table, mean, k = carry
        i = jax.random.randint(jax.random.fold_in(key, k), (), 0, rates.blocks, jnp.int32)
        new, loss = directions(example, theta, phi, v, view(whole(example), key, i))
        change = jax.tree.map(lambda new, old: new - old[i], new, table)
        d_phi, d_v, d_theta = jax.tree.map(jnp.add, change, mean)
        table = jax.tree.map(lambda old, new: old.at[i].set(new), table, new)
        mean = jax.tree.map(lambda m, c: m + c / rates.blocks, mean, change)
        phi, v = phi - rates.inner * d_phi, v - rates.linear * d_v
        return (theta - rates.outer * d_theta, phi, v, table, mean, k + 1), loss

    return first, body


def f2sa(example: Example, view: View, key: Array, rates: Rates) -> Loop:
    """Kwon et al. (2023), Algorithm 1, with central differences; one step of φ₊ and φ₋."""
    delta = rates.delta

    def tilted(phi: Array, theta: Array, seen: Context, weight: float) -> tuple[Array, Array]:
        at = seen._replace(theta=theta)
        outer = example.problem.outer_loss(phi, at)[0]
        return example.problem.inner_loss(phi, at) + weight * outer, outer

    by_phi, by_theta = (jax.grad(tilted, argnums, has_aux=True) for argnums in (0, 1))

    def body(carry: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        theta, plus, minus, k = carry
        seen = view(whole(example), key, k)
        plus = plus - rates.inner * by_phi(plus, theta, seen, delta)[0]
        minus = minus - rates.inner * by_phi(minus, theta, seen, -delta)[0]
        seen = view(whole(example), jax.random.fold_in(key, OUTER), k)
        up, above = by_theta(plus, theta, seen, delta)
        down, below = by_theta(minus, theta, seen, -delta)
        theta = theta - rates.outer * (up - down) / (2 * delta)
        return (theta, plus, minus, k + 1), (above + below) / 2

    return lambda theta: (theta, *zeros(example, theta, 2), jnp.int32(0)), body


def directions(
    example: Example, theta: Array, phi: Array, v: Array, seen: Context
) -> tuple[tuple[Array, Array, Array], Array]:
    """D_φ, D_v and D_θ at one point, by one forward pass over a gradient, and f."""

    def g(phi: Array, theta: Array) -> Array:
        return example.problem.inner_loss(phi, seen._replace(theta=theta))

    def f(phi: Array, theta: Array) -> Array:
        return example.problem.outer_loss(phi, seen._replace(theta=theta))[0]

    slopes = lambda phi: jax.grad(g, argnums=(0, 1))(phi, theta)  # noqa: E731
    (d_phi, _), (hessian_v, mixed_v) = jax.jvp(slopes, (phi,), (v,))
    loss, (f_phi, f_theta) = jax.value_and_grad(f, argnums=(0, 1))(phi, theta)
    return (d_phi, hessian_v - f_phi, f_theta - mixed_v), loss


def whole(example: Example) -> Context:
    return Context(example.theta, *example.data)


def zeros(example: Example, theta: Array, count: int) -> list[Array]:
    return [example.problem.init(theta) for _ in range(count)]


BY_HAND: dict[str, Callable[[Example, View, Array, Rates], Loop]] = {
    "soba": soba,
    "ma_soba": ma_soba,
    "saba": saba,
    "f2sa": f2sa,
}
"""By the name of the recipe."""

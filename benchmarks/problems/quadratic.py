r"""Many-task bilevel problems in any dimension whose hypergradient is known in closed form.

    g_i(φ, θ) = ½ φᵀ A_i φ − φᵀ (β ∘ θ),    A_i = H_i diag(d) H_i,    H_i = I − 2 u_i u_iᵀ

so that A_i φ and A_i⁻¹ φ cost O(dim), φ_i* = A_i⁻¹(β ∘ θ), and with r = φ − t_i

    f_i = ½ ‖r‖²  (convex)    or    f_i = Σ r² / (1 + r²)  (bounded, not convex)
    ∇F  = mean_i β ∘ A_i⁻¹ ∂_φ f_i(φ_i*)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta.certificate import Constants, deviations_from
from memmeta.problem import Problem, Structure


class Tasks(NamedTuple):
    """u_i and t_i."""

    direction: Float[Array, "*tasks dim"]
    target: Float[Array, "*tasks dim"]


@dataclass(frozen=True)
class Family:
    """A distribution of such tasks."""

    spectrum: Float[Array, " dim"]  # d, ascending: κ = d[-1] / d[0]
    coupling: Float[Array, " dim"]  # β
    convex: bool = True  # which f
    spread: float = 1.0  # standard deviation of the targets about a common one
    scale: float | Float[Array, " dim"] = 1.0  # of the targets

    def sample(self, key: Array, count: int) -> Tasks:
        """`count` independent tasks."""
        keys = jax.random.split(key, 3)
        direction = jax.random.normal(keys[0], (count, self.spectrum.size))
        direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
        centre = jax.random.normal(keys[1], self.spectrum.shape)
        target = centre + self.spread * jax.random.normal(keys[2], direction.shape)
        return Tasks(direction, self.scale * target)

    def product(self, task: Tasks, x: Array, power: int = 1) -> Array:
        """A_i^power x."""
        return _reflect(task, self.spectrum**power * _reflect(task, x))

    def residual_loss(self, r: Array) -> Array:
        return 0.5 * jnp.sum(r**2) if self.convex else jnp.sum(r**2 / (1 + r**2))

    def loss(self, theta: Array, tasks: Tasks) -> Array:
        """F, in closed form; not negative."""

        def one(task: Tasks) -> Array:
            return self.residual_loss(self.product(task, self.coupling * theta, -1) - task.target)

        return jnp.mean(jax.vmap(one)(tasks))

    def gradient(self, theta: Array, tasks: Tasks) -> Array:
        """∇F, in closed form."""

        def one(task: Tasks) -> Array:
            best = self.product(task, self.coupling * theta, -1)
            slope = jax.grad(self.residual_loss)(best - task.target)
            return self.coupling * self.product(task, slope, -1)

        return jnp.mean(jax.vmap(one)(tasks), axis=0)

    @property
    def smoothness(self) -> Array:
        """A bound on the curvature of F: L_F ≤ L_f max β² / min d²."""
        curvature = 1.0 if self.convex else 2.0
        return curvature * jnp.max(self.coupling) ** 2 / jnp.min(self.spectrum) ** 2

    def problem(self) -> Problem:
        """The bilevel problem, with all its constants."""

        def constants(phi: Array, radius: Array, context: Any) -> Constants:
            zero, one = jnp.zeros_like(radius), jnp.ones_like(radius)
            curvature = one if self.convex else 2 * one
            return Constants(zero, curvature, zero, zero, one, jnp.max(self.coupling))

        return Problem(
            embed=lambda theta, task: (self.coupling * theta, task),
            inner_loss=lambda phi, c: 0.5 * phi @ self.product(c[1], phi) - phi @ c[0],
            outer_loss=lambda phi, c: (self.residual_loss(phi - c[1].target), {}),
            init=jnp.zeros_like,
            smoothness=lambda c: jnp.max(self.spectrum),
            strong_convexity=lambda c: jnp.min(self.spectrum),
            structure=Structure(deviations=deviations_from(constants)),
        )


def _reflect(task: Tasks, x: Array) -> Array:
    return x - 2 * task.direction * (task.direction @ x)

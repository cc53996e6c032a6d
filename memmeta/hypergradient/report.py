r"""How far a hypergradient can be trusted: the same figures for every estimator."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta.inner import InnerState


class Report(NamedTuple):
    """How far a hypergradient can be trusted, per task; infinite means "not known", never "fine".

    Attributes:
        inner_gradient_norm: ‖∇_φ g‖, zero when the inner loop has converged: at φ̂ for `implicit`
            and `sample_space`, where the last step was made from for the others (one gradient
            saved).
        inner_steps: inner steps made; fewer than asked for where a tolerance stopped the loop.
        linear_residual: ‖∂_φ f − (∂²_φφ g) v‖ / ‖∂_φ f‖; 0 where no linear system is solved.
        smallest_curvature: the smallest pᵀ(∂²_φφ g)p / pᵀp met, infinite where none was; negative
            means that φ̂ is no minimum and the implicit function theorem does not hold.
        linear_iterations: Hessian-vector products that went into v.
        error_estimate: of ‖∇̂F_i − ∇F_i‖, the distance from the hypergradient of the inner solution,
            in the space of the context (which is that of θ where the context is θ) and, where φ₀
            depends on θ, of φ₀; see `error_estimate.judged`. For estimators that draw directions it
            is that of their mean. It needs a curvature: `Problem.strong_convexity` or, for
            `implicit`, the smallest met. Infinite where there is none, for `reptile`, which
            estimates no gradient, and for estimators that take fewer derivatives than it needs
            unless they are made with `estimate_error=True`.
        error_bound: a rigorous bound on the same error, where the problem gives its constants (see
            `memmeta.certificate`). In θ where `Constants.embedding` bounds ‖∂c/∂θ‖, and its mean
            over tasks then bounds the error of the whole meta-step; where `embedding` is 1, as for
            linear heads, it bounds the error in c alone, and ‖∂c/∂θ‖ times its mean that in θ.
        standard_error: the expected length of the random part of the estimate of ∇F_i; 0 for
            estimators that draw nothing.
    """

    inner_gradient_norm: Float[Array, "*tasks"]
    inner_steps: Float[Array, "*tasks"]
    linear_residual: Float[Array, "*tasks"]
    smallest_curvature: Float[Array, "*tasks"]
    linear_iterations: Float[Array, "*tasks"]
    error_estimate: Float[Array, "*tasks"]
    standard_error: Float[Array, "*tasks"]
    error_bound: Float[Array, "*tasks"]


def unsolved_report(state: InnerState) -> Report:
    """The report of an estimator that solves no linear system, from the inner loop's last state."""
    length = jax.lax.stop_gradient(state.gradient_norm)
    none, unknown = jnp.zeros_like(length), jnp.full_like(length, jnp.inf)
    steps = state.steps.astype(length.dtype)
    return Report(length, steps, none, unknown, none, unknown, none, unknown)

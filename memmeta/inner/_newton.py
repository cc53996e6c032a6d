r"""Newton's method with a matrix-free linear solver and Levenberg's damping."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta._shared import trees
from memmeta._shared.readable import named
from memmeta.inner._solver import InnerSolver, rounding
from memmeta.linear_solve import LinearSolver, cg
from memmeta.problem import Context, Params, Problem, Scalar

# Levenberg's damping: tenfold after a refused step, a tenth after an accepted one; the first is a
# thousandth of the curvature along the gradient.
LARGER, SMALLER, FIRST = 10.0, 0.1, 1e-3


class NewtonState(NamedTuple):
    """State of `newton`.

    Attributes:
        damping: λ, zero until a step is refused.
    """

    damping: Scalar


@named
def newton(solver: LinearSolver | None = cg(20)) -> InnerSolver:
    r"""Newton-CG: quadratic convergence near a minimum; a step that does not decrease g is refused.

    $$\phi_{k+1} = \phi_k - (\partial^2_{\phi\phi} g + \lambda_k I)^{-1} \nabla_\phi g$$

    A refused step enlarges λ; after accepted ones it shrinks to zero. One step solves a quadratic
    problem.

    Args:
        solver: of the linear system, see `memmeta.linear_solve`. None writes out the Jacobian of
            ∇g and factorises it: for few inner parameters, and under `sample_space`, where that
            Jacobian is not symmetric and `cg` would be wrong.

    Returns:
        The solver.

    Source: Nocedal and Wright, Numerical Optimization (2006), sections 7.1 and 10.3.

    Example:
        >>> from memmeta.inner import InnerLoop
        >>> loop = InnerLoop(newton(), steps=8)
    """

    def init(problem: Problem, params: Params, context: Context) -> NewtonState:
        dtype = jax.eval_shape(problem.inner_loss, params, context).dtype
        return NewtonState(jnp.zeros((), dtype))

    def update(
        problem: Problem,
        params: Params,
        state: NewtonState,
        context: Context,
        step: Array,
        key: Array,
    ) -> tuple[Params, NewtonState, Scalar]:
        def gradient_at(params: Params) -> tuple[Params, Scalar]:
            loss, gradient = jax.value_and_grad(problem.inner_loss)(params, context)
            return gradient, loss

        # ∂²g u as a vector-Jacobian product: the Hessian is symmetric, and a ∇g with a `custom_vjp`
        # rule (`mixed_mode`, `hessian_free`) has no forward derivative.
        gradient, transposed, loss = jax.vjp(gradient_at, params, has_aux=True)

        def product(vector: Params) -> Params:
            (image,) = transposed(vector)
            return jax.tree.map(lambda h, v: h + state.damping.astype(v.dtype) * v, image, vector)

        change = _dense(product, gradient) if solver is None else solver(product, gradient).value
        proposal = jax.tree.map(jnp.subtract, params, change)
        # norms have no derivative at zero, and these only decide
        norm, moved = jax.lax.stop_gradient((trees.norm(gradient), trees.norm(change)))
        reached = problem.inner_loss(proposal, context)
        # A solver that failed returns zero; refusing it makes λ grow, unless ∇g is zero too.
        accepted = (reached <= loss + rounding(loss)) & ((moved > 0) | (norm == 0))
        curvature = trees.norm(product(gradient)) / jnp.where(norm > 0, norm, 1)
        first = FIRST * jax.lax.stop_gradient(curvature).astype(loss.dtype)
        # λ belongs to the method: see `_measure` in `_descent.py`
        larger = jnp.maximum(LARGER * state.damping, first)
        smaller = jnp.where(state.damping > first, SMALLER * state.damping, 0)
        damping = jax.lax.stop_gradient(jnp.where(accepted, smaller, larger))
        return trees.where(accepted, proposal, params), NewtonState(damping), norm

    return InnerSolver(init, update)


def _dense(product: Callable[[Params], Params], gradient: Params) -> Params:
    """The Newton step by a dense solve; zero, which is refused, where the matrix is singular."""
    flat, unravel = trees.ravel(gradient)
    rows = jax.vmap(lambda e: trees.ravel(product(unravel(e)))[0])(
        jnp.eye(flat.size, dtype=flat.dtype)
    )
    step = jnp.linalg.solve(rows, flat)
    return unravel(jnp.where(jnp.isfinite(step), step, 0))

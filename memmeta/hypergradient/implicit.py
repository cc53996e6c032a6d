r"""The implicit hypergradient: the last inner iterate, one linear solve, one mixed product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta import trees
from memmeta.hypergradient.estimator import Estimator, Report, TaskGradient, per_task
from memmeta.inner import InnerLoop
from memmeta.linear_solve import LinearSolver, cg
from memmeta.problem import Context, Params, Problem, Scalar


def implicit(solver: LinearSolver = cg(20)) -> Estimator:
    r"""The hypergradient by the implicit function theorem; memory does not grow with K.

    $$\nabla F_i = \partial_c f_i - \partial^2_{c\phi} g_i \, v_i, \qquad
      [\partial^2_{\phi\phi} g_i] \, v_i = \partial_\phi f_i \quad\text{at } \hat\phi = \phi_K$$

    in the context c, pulled back through `embed` by `per_task`. Only φ_K is kept of the inner loop.

    Args:
        solver: of the linear system, see `memmeta.linear_solve`.

    Returns:
        The estimator.

    Source: Yang, Ma, Yu (AAAI 2025), Algorithm 1; the theorem in this form: Pedregosa (2016).

    Example:
        >>> from memmeta.linear_solve import cg
        >>> estimator = implicit(solver=cg(steps=20))
    """

    def rule(
        problem: Problem, inner: InnerLoop, start: Params, context: Context, key: Array
    ) -> TaskGradient:
        params = inner(problem, start, context)
        gradient, hessian_product = jax.linearize(
            lambda phi: jax.grad(problem.inner_loss)(phi, context), params
        )
        loss, pull_back, aux = jax.vjp(problem.outer_loss, params, context, has_aux=True)
        outer_params, outer_context = pull_back(jnp.ones_like(loss))
        solution = solver(hessian_product, outer_params)

        def along_solution(context: Context) -> Scalar:
            # forward over reverse of ⟨∇_φ g, v⟩, without the memory of a second reverse pass
            return jax.jvp(lambda p: problem.inner_loss(p, context), (params,), (solution.value,))[1]

        mixed = jax.grad(along_solution)(context)
        report = Report(
            trees.norm(gradient),
            solution.residual,
            solution.curvature,
            solution.iterations.astype(loss.dtype),
        )
        context_bar = jax.tree.map(jnp.subtract, outer_context, mixed)
        return TaskGradient(loss, aux, context_bar, None, report)

    return per_task(rule, "implicit", through_start=False)

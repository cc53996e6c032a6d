r"""A fully first-order estimator: the inner problem solved again with a little of f added."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from memmeta._shared import checks
from memmeta._shared.readable import named
from memmeta.hypergradient._differences import step_length
from memmeta.hypergradient._estimator import TaskGradient, TaskStart, per_task, report_of_loop
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient
from memmeta.hypergradient._structural_zeros import losses_seen
from memmeta.inner import InnerLoop
from memmeta.problem import Context, MetaParams, Params, Problem, Scalar


@named
def perturbed(delta: float | None = None) -> Estimator:
    r"""The implicit hypergradient without a second derivative; memory does not grow with K.

    $$\nabla F_i \approx \frac{\partial_c (g_i + \delta f_i)(\phi_+)
      - \partial_c (g_i - \delta f_i)(\phi_-)}{2 \delta}, \qquad
      \phi_\pm = \arg\min_\phi\, (g_i \pm \delta f_i)(\phi)$$

    Both inner problems are solved by the inner loop, from φ_K: three loops in all. The bias is
    O(δ²); what the loops leave of their slopes counts 1/δ times.

    Args:
        delta: δ; None takes the one at which rounding and bias are alike in the coarsest dtype of
            φ: 6e-6 in float64, 5e-3 in float32, 0.2 in bfloat16. Take a larger one where the loops
            do not converge to rounding.

    Returns:
        The estimator.

    Raises:
        ValueError: `delta` is no finite number above 0.

    Source: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel
    Optimization" (F²SA, ICML 2023), with central differences as in Chayti and Jaggi, "A New
    First-Order Meta-Learning Algorithm with Convergence Guarantees" (2024).

    Example:
        >>> estimator = perturbed(delta=1e-2)
    """
    if delta is not None:
        checks.positive("delta", delta)

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        # Rules see φ in float32 at least; its losses, and so their rounding, see its own dtype.
        length = step_length(delta, jax.eval_shape(problem.init, meta_params))
        whole = per_task(partial(_rule, length), "perturbed", losses_seen)
        return whole(problem, inner, meta_params, chunk)

    return estimator


def _rule(length: float, problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
    context = begin.context.whole
    state = inner.run(problem, begin.params, context, begin.key, begin.earlier)
    # under a warm start with draws of their own: from step 0 on they would always see the same
    key = begin.key if begin.earlier is None else jax.random.fold_in(begin.key, state.steps)
    loss, aux = problem.outer_loss(state.params, context)

    def slope(weight: float) -> Context:
        """∂_c (g + weight · f) at its own solution."""
        tilted = _with_outer(problem, weight)
        solved = inner.run(tilted, state.params, context, key).params
        at_solved = lambda active: tilted.inner_loss(solved, begin.context.at(active))  # noqa: E731
        return jax.grad(at_solved)(begin.context.active)

    change = jax.tree.map(jnp.subtract, slope(length), slope(-length))
    context_bar = jax.tree.map(lambda x: x / (2 * length), change)
    return TaskGradient(loss, aux, context_bar, None, report_of_loop(state), state)


def _with_outer(problem: Problem, weight: float) -> Problem:
    """The problem with g + weight · f in place of g, whose curvature bounds are not known."""

    def inner_loss(params: Params, context: Any) -> Scalar:
        inner, outer = problem.inner_loss(params, context), problem.outer_loss(params, context)[0]
        return inner + jnp.asarray(weight).astype(inner.dtype) * outer.astype(inner.dtype)

    return replace(problem, inner_loss=inner_loss, smoothness=None, strong_convexity=None)

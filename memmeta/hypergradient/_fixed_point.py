r"""The hypergradient at a fixed point of the inner solver's own step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from memmeta._shared import trees
from memmeta._shared.readable import named
from memmeta.hypergradient._estimator import TaskGradient, TaskStart, per_task, report_of_loop
from memmeta.hypergradient._seam import Estimator
from memmeta.inner import InnerLoop, InnerState
from memmeta.linear_solve import LinearSolver, gmres
from memmeta.linear_solve._solution import Product, Vector, unit
from memmeta.problem import Context, Params, Problem, Scalar

POWERS = 5
"""Products between the two norms of which the ratio gives `contraction`."""


class Point(NamedTuple):
    """What one step of the inner solver maps to itself at a fixed point.

    Attributes:
        params: φ.
        state: the leaves of the solver's state that φ moves, such as a momentum.
    """

    params: Params
    state: Any


Step = Callable[[Point, Context], Point]


@named
def fixed_point(solver: LinearSolver = gmres(20)) -> Estimator:
    r"""The hypergradient where φ* = T(φ*, c), T one step of the inner solver; memory is flat in K.

    $$\nabla F_i = \partial_c f_i + (\partial_c T)^\top w_i, \qquad
      [I - \partial_\phi T]^\top w_i = \partial_\phi f_i \quad\text{at } \hat\phi = \phi_K$$

    Whatever the steps do is in T: weight decay in the optimiser, projections onto constraints that
    are active, proximal steps of a penalty that is not smooth. `implicit` differentiates
    ∇_φ g = 0, which none of these solves. With momentum or Adam, φ stands for φ together with what
    it moves in the solver's state; rates and counts, which it does not move, are constants of T.

    The report's `inner_gradient_norm` and `inner_reduction` are those of φ − T(φ), and its
    `contraction` says at what rate the steps approach the fixed point: where that is 1 or more they
    do not, and the rule does not hold.

    Args:
        solver: of the linear system, which is not symmetric, see `memmeta.linear_solve`.

    Returns:
        The estimator.

    Source: Griewank and Faure (2003); for bilevel problems: Grazzi et al. (ICML 2020), equation 8;
    for proximal steps: Bertrand et al., "Implicit differentiation for fast hyperparameter selection
    in non-smooth convex learning" (JMLR 2022).

    Example:
        >>> import optax
        >>> import memmeta as mm
        >>> decaying = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.2))
        >>> inner, estimator = mm.InnerLoop(decaying, steps=100), fixed_point()
    """

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        context = begin.context
        state = inner.run(problem, begin.params, context.whole, begin.key, begin.earlier)
        moved_by = moving(problem, inner, state, context.whole, begin.key)
        point, rest = point_of(state, moved_by)
        step = jax.checkpoint(step_map(problem, inner, rest, begin.key))

        def outer_loss(params: Params, active: Context) -> tuple[Scalar, Any]:
            return problem.outer_loss(params, context.at(active))

        loss, pull_back, aux = jax.vjp(outer_loss, point.params, context.active, has_aux=True)
        by_params, by_context = pull_back(jnp.ones_like(loss))
        b = Point(by_params, jax.tree.map(jnp.zeros_like, point.state))
        moved, transposed = jax.vjp(lambda z: step(z, context.whole), point)

        def product(w: Point) -> Point:
            image: Point = jax.tree.map(jnp.subtract, w, transposed(w)[0])
            return image

        # as in `implicit`: the mixed product not before the solve has ended
        solution = jax.lax.optimization_barrier(solver(product, b, start=begin.guess))
        mixed = jax.vjp(lambda a: step(point, context.at(a)), context.active)[1]
        cotangent = jax.tree.map(jnp.add, by_context, mixed(solution.value)[0])

        begun = inner.start(problem, begin.params, context.whole, begin.earlier)
        start, first_rest = point_of(begun, moved_by)
        first = step_map(problem, inner, first_rest, begin.key)(start, context.whole)
        report = report_of_loop(
            state._replace(
                gradient_norm=_distance(point, moved), first_gradient_norm=_distance(start, first)
            )
        )._replace(
            linear_residual=solution.residual,
            linear_iterations=solution.iterations.astype(state.gradient_norm.dtype),
            linear_status=jnp.asarray(solution.status, state.gradient_norm.dtype),
            contraction=contraction(lambda w: transposed(w)[0], b),
        )
        return TaskGradient(loss, aux, cotangent, None, report, state, solution.value)

    return per_task(rule, "fixed_point")


def moving(
    problem: Problem, inner: InnerLoop, state: InnerState, context: Context, key: Key[Array, ""]
) -> PyTree[bool]:
    """Which leaves of the solver's state depend on φ or the context, through however many steps.

    The others, such as a rate or its own schedule, need not come to rest, and a row of I − ∂T of
    theirs would be zero: as constants they leave the linear system as regular as it is.
    """

    def step(inputs: tuple[Params, Any, Context]) -> Any:
        params, solver, context = inputs
        return inner.steps_of.update(problem, params, solver, context, state.steps, key)[1]

    solver = state.solver
    found = trees.reach(step, (state.params, solver, context))
    first = len(jax.tree.leaves(trees.split_inexact(state.params)[0]))
    own = [i for i, leaf in enumerate(jax.tree.leaves(solver)) if trees.is_inexact(leaf)]
    moves = [np.array(jax.tree.leaves(outputs), bool) for outputs in found]
    from_state = dict(zip(own, moves[first : first + len(own)], strict=True))
    moved = np.zeros(len(jax.tree.leaves(solver)), bool)
    for outputs in moves[:first] + moves[first + len(own) :]:
        moved |= outputs
    for _ in own:  # a chain through the state is no longer than its leaves
        for leaf, outputs in from_state.items():
            if moved[leaf]:
                moved |= outputs
    return jax.tree.unflatten(jax.tree.structure(solver), moved.tolist())


def point_of(state: InnerState, moved: PyTree[bool]) -> tuple[Point, Any]:
    """The inner loop's state as a `Point`, and what is a constant of T: rates, counts, keys."""
    floats, others = trees.split(state.solver, moved)
    return Point(state.params, floats), (others, state.steps)


def step_map(problem: Problem, inner: InnerLoop, rest: Any, key: Key[Array, ""]) -> Step:
    """T: (point, context) -> the point after one more step, on the whole context."""
    others, number = rest

    def step(point: Point, context: Context) -> Point:
        state = trees.merge(point.state, others)
        params, state, _ = inner.steps_of.update(problem, point.params, state, context, number, key)
        kept = jax.tree.map(
            lambda leaf, new: None if leaf is None else new, point.state, state, is_leaf=_absent
        )
        return Point(params, kept)

    return step


def _absent(leaf: Any) -> bool:
    return leaf is None


def contraction(product: Product, start: Vector) -> Scalar:
    r"""The rate (‖J²ᵐ u‖ / ‖Jᵐ u‖)^(1/m) at which J, the derivative of a step, shrinks a vector.

    Its limit is the spectral radius of J, which decides whether the steps approach a fixed point;
    the norm of J may be above 1 all the same, as it is with momentum.

    Example:
        >>> rate = contraction(lambda x: jnp.array([0.5, 0.9]) * x, jnp.ones(2))
        >>> round(float(rate), 1)
        0.9
    """

    def shrink(vector: Vector, _: None) -> tuple[Vector, Array]:
        image = product(unit(vector)[0])
        return image, trees.norm(image)

    _, norms = jax.lax.scan(shrink, start, length=2 * POWERS)
    later = norms[POWERS:]
    # zero once the vector is: all of it was in the kernel
    logs = jnp.where(later > 0, jnp.log(jnp.where(later > 0, later, 1)), -jnp.inf)
    return jax.lax.stop_gradient(jnp.exp(jnp.mean(logs)))


def _distance(point: Point, moved: Point) -> Scalar:
    return trees.norm(jax.tree.map(jnp.subtract, point.params, moved.params))

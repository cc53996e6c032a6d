r"""The interface of linear solvers, their answer, and what all of them have in common.

`make_solver` turns a bare method into a solver: it takes care of scale, damping, preconditioning, a
warm start and the final residual.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from memmeta import _checks
from memmeta import _trees as trees
from memmeta.problem import Context, Params, Problem

Vector: TypeAlias = Any
Product: TypeAlias = Callable[[Vector], Vector]


class LinearSolution(NamedTuple):
    """What a linear solver found and how it ended.

    Attributes:
        value: x, like b; finite wherever b is.
        residual: ‖b − A x‖ / ‖b‖, computed from x itself and without the damping; 0 where b = 0,
            infinite where A x is not finite.
        curvature: the smallest pᵀA p / pᵀp met; negative where A was seen to be indefinite,
            infinite where no direction was looked at.
        iterations: products with A that went into x.
    """

    value: Vector
    residual: Float[Array, ""]
    curvature: Float[Array, ""]
    iterations: Int32[Array, ""]


@runtime_checkable
class LinearSolver(Protocol):
    """Solves A x = b for a symmetric A that is known by its products, see `__call__`."""

    def __call__(
        self,
        product: Product,
        b: Vector,
        *,
        problem: Problem | None = None,
        params: Params | None = None,
        context: Context | None = None,
        start: Vector | None = None,
    ) -> LinearSolution:
        """Solve one system.

        Args:
            product: x -> A x, on pytrees.
            b: the right-hand side.
            problem: whose Hessian ∂²_φφ g(φ) A is; for solvers that use its structure.
            params: φ.
            context: of the task.
            start: a guess of x; None means zero.

        Returns:
            What was found, and how it ended.
        """
        ...


class Operator(NamedTuple):
    """The system as a method sees it: S (A + λ I) S, with S = diag(A)^(-1/2) when preconditioned.

    Attributes:
        product: y -> S (A + λ I) S y.
        curvature: (y, yᵀ S (A + λ I) S y) -> pᵀA p / pᵀp of the direction p = S y.
    """

    product: Product
    curvature: Callable[[Vector, Float[Array, ""]], Float[Array, ""]]


Method: TypeAlias = Callable[[Operator, Vector], tuple[Vector, Array, Array]]
"""(operator, b of norm 1) -> x, smallest curvature met, products made."""


def dot(a: Vector, b: Vector) -> Float[Array, ""]:
    """aᵀb over whole trees."""
    return jnp.asarray(optax.tree.vdot(a, b))


def axpy(scale: Float[Array, ""], x: Vector, y: Vector) -> Vector:
    """scale · x + y."""
    return jax.tree.map(lambda a, b: scale.astype(a.dtype) * a + b, x, y)


def scaled(scale: Float[Array, ""], x: Vector) -> Vector:
    """scale · x."""
    return jax.tree.map(lambda a: scale.astype(a.dtype) * a, x)


def unit(b: Vector) -> tuple[Vector, Float[Array, ""]]:
    """b/‖b‖ and ‖b‖, so that tiny and huge right-hand sides are all the same to a solver."""
    # A solution is homogeneous in b, so the norm may be held constant when differentiated.
    norm = jax.lax.stop_gradient(trees.norm(b))
    return jax.tree.map(lambda x: x / jnp.where(norm > 0, norm, 1).astype(x.dtype), b), norm


def make_solver(
    method: Method,
    damping: float = 0.0,
    diagonal: Callable[[Product, Vector], Vector] | None = None,
) -> LinearSolver:
    r"""Turn a bare method into a solver.

    With S = diag(A + λ I)^(-1/2), or I without preconditioning, the method solves
    $$S (A + \lambda I) S \, y = S (b - (A + \lambda I) x_0) \,/\, \|\cdot\|, \qquad
      x = x_0 + \|\cdot\| \, S y$$
    so it always sees a right-hand side of norm 1. A warm start x₀ that is further from the
    solution than zero is dropped.

    Args:
        method: the bare method.
        damping: λ, 0 or more.
        diagonal: (product, like) -> an estimate of the diagonal of A; see `jacobi`.

    Returns:
        The solver.

    Raises:
        ValueError: `damping` is negative.
    """
    _checks.not_negative("damping", damping)

    def solve(
        product: Product,
        b: Vector,
        *,
        problem: Problem | None = None,
        params: Params | None = None,
        context: Context | None = None,
        start: Vector | None = None,
    ) -> LinearSolution:
        wide = jax.tree.map(lambda x: x.astype(trees.accumulator(x.dtype)), b)

        def image(x: Vector) -> Vector:  # A x with sums in float32 at least
            return _cast(product(_cast(x, b)), wide)

        def damped(x: Vector) -> Vector:
            return jax.tree.map(lambda a, p: a + damping * p, image(x), x) if damping else image(x)

        operator, scaling = _scaled_operator(image, damped, damping, diagonal, wide)
        target, norm = unit(wide)
        guess, target = _warm(damped, start, target, norm)
        rest = jnp.ones_like(norm)
        if start is not None or diagonal is not None:
            target, rest = unit(scaling(target))
        step, curvature, iterations = method(operator, target)
        value = jax.tree.map(jnp.add, guess, scaled(rest, scaling(step)))
        return _finish(image, b, scaled(norm, value), curvature, iterations)

    return solve


def _cast(tree: Vector, like: Vector) -> Vector:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _scaled_operator(
    image: Product,
    damped: Product,
    damping: float,
    diagonal: Callable[..., Any] | None,
    like: Vector,
) -> tuple[Operator, Product]:
    if diagonal is None:
        scaling: Product = lambda x: x  # noqa: E731
    else:
        roots = jax.tree.map(
            lambda d: jax.lax.rsqrt(jnp.abs(d) + damping), _floored(diagonal(image, like))
        )
        scaling = lambda x: jax.tree.map(jnp.multiply, roots, x)  # noqa: E731

    def curvature(y: Vector, quadratic: Float[Array, ""]) -> Float[Array, ""]:
        p = scaling(y)
        square = dot(p, p)
        return quadratic / jnp.where(square > 0, square, 1) - damping

    return Operator(lambda y: scaling(damped(scaling(y))), curvature), scaling


def _floored(diagonal: Vector) -> Vector:
    """No entry under a thousandth of the largest: an estimate near zero would blow its entry up."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(d)) for d in jax.tree.leaves(diagonal)]))
    floor = jnp.where(jnp.isfinite(largest) & (largest > 0), 1e-3 * largest, 1)
    return jax.tree.map(
        lambda d: jnp.where(jnp.isfinite(d), jnp.maximum(jnp.abs(d), floor.astype(d.dtype)), 1),
        diagonal,
    )


def _warm(
    damped: Product, start: Vector | None, target: Vector, norm: Float[Array, ""]
) -> tuple[Vector, Vector]:
    """The guess of a warm start in units of ‖b‖, and what it leaves to be solved."""
    zeros = jax.tree.map(jnp.zeros_like, target)
    if start is None:
        return zeros, target
    guess = scaled(1 / jnp.where(norm > 0, norm, 1), _cast(start, target))
    left = jax.tree.map(jnp.subtract, target, damped(guess))
    helps = trees.all_finite(guess) & (trees.norm(left) <= 1)  # False for NaN too
    return trees.where(helps, guess, zeros), trees.where(helps, left, target)


def _finish(
    image: Product, b: Vector, value: Vector, curvature: Array, iterations: Array
) -> LinearSolution:
    value = jax.tree.map(lambda x, like: x.astype(like.dtype), value, b)
    # A solution too large for its dtype, or a system of NaN, would make what comes after NaN.
    representable = trees.all_finite(value) | ~trees.all_finite(b)
    value = jax.tree.map(lambda x: jnp.where(representable, x, 0), value)
    target, norm = unit(jax.tree.map(lambda x: x.astype(trees.accumulator(x.dtype)), b))
    reached = scaled(1 / jnp.where(norm > 0, norm, 1), _late(image, value))
    residual = trees.norm(jax.tree.map(jnp.subtract, target, reached))
    residual = jnp.where(jnp.isnan(residual) | ~representable, jnp.inf, residual)
    curvature = jnp.where(jnp.isnan(curvature), jnp.inf, curvature)
    # figures for the report: norms have no derivative at zero
    residual, curvature = jax.lax.stop_gradient((jnp.where(norm == 0, 0, residual), curvature))
    return LinearSolution(value, residual, curvature.astype(residual.dtype), iterations)


def _late(product: Product, x: Vector) -> Vector:
    """A x in a loop of one turn, of which XLA cannot see that it is one.

    Outside of a loop XLA (jax 0.10.2) would start whatever of the product does not depend on x
    before the method's own loop, and keep it in memory all through that.
    """
    turns = jax.lax.optimization_barrier(jnp.int32(1))
    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(product, x))
    return jax.lax.while_loop(
        lambda carry: carry[0] < turns,
        lambda carry: (carry[0] + 1, product(x)),
        (jnp.int32(0), zeros),
    )[1]


def useful_steps(steps: int, b: Vector) -> int:
    """No more Krylov steps than twice the dimension; exact arithmetic needs no more than once.

    Example:
        >>> useful_steps(20, jnp.ones(2))
        4
    """
    return min(steps, 2 * sum(int(leaf.size) for leaf in jax.tree.leaves(b)))


def explain(solution: LinearSolution, tolerance: float = 1e-3) -> str:
    """Say in one sentence how a solver ended, and what to do about it.

    Args:
        solution: of one system, outside `jax.jit`.
        tolerance: relative residual that counts as solved.

    Returns:
        The sentence.

    Example:
        >>> solution = LinearSolution(jnp.ones(2), jnp.float32(0.2), jnp.float32(0.1), jnp.int32(5))
        >>> explain(solution)
        'Not solved: residual 0.2 after 5 products. Take more steps, a preconditioner, or damping.'
    """
    residual, curvature = float(solution.residual), float(solution.curvature)
    after = f"residual {residual:.2g} after {int(solution.iterations)} products"
    if not residual < float("inf"):
        return (
            "Failed: the system or its solution is not finite. Look for NaN in the task, or make "
            "the inner loss strongly convex (ridge, proximal term, damping)."
        )
    if curvature < 0:
        return (
            f"Negative curvature {curvature:.2g} met, {after}: the inner loss is not convex here. "
            "Add a ridge or a proximal term, take more inner steps, or use minres()."
        )
    if residual <= tolerance:
        return f"Solved: {after}, smallest curvature met {curvature:.2g}."
    if curvature < 1e-6:
        return (
            f"Not solved: {after}, and the system is close to singular (curvature {curvature:.2g})."
            " Add a ridge or damping."
        )
    return f"Not solved: {after}. Take more steps, a preconditioner, or damping."

r"""The interface of linear solvers, their answer, and what all of them have in common.

`make_solver` turns a bare method into a solver: it takes care of scale, damping, preconditioning, a
warm start and the final residual.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.linear_solve._status import Status, is_asymmetric, is_positive
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
        products: all that were made: those of steps that changed nothing, of the preconditioner,
            of a warm start and of the checks too.
        status: 0, or the number of what is wrong with the system: 1 not finite, 2 an asymmetric
            product, 3 a preconditioner that is not positive, 4 a breakdown. Of an A x that is not
            finite most solvers say so by the `residual` alone. `explain` puts it in words.
    """

    value: Vector
    residual: Float[Array, ""]
    curvature: Float[Array, ""]
    iterations: Int32[Array, ""]
    products: Int32[Array, ""] | int = 0
    status: Int32[Array, ""] | int = 0


@runtime_checkable
class LinearSolver(Protocol):
    """Solves A x = b for an A that is known by its products, see `__call__`."""

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


class System(NamedTuple):
    """What a preconditioner is made of.

    Attributes:
        product: x -> A x, in float32 at least.
        like: a vector, for shapes and dtypes.
        damping: λ; the system is (A + λ I) x = b.
        problem, params, context: as given to the solver.
    """

    product: Product
    like: Vector
    damping: float = 0.0
    problem: Problem | None = None
    params: Params | None = None
    context: Context | None = None


Preconditioner: TypeAlias = Callable[[System], tuple[Product, int]]
"""system -> (r -> M⁻¹ r, products made for it), with a positive definite M ≈ A + λ I."""


class Operator(NamedTuple):
    """The system as a method sees it.

    Attributes:
        product: x -> (A + λ I) x.
        inverse: r -> M⁻¹ r of the preconditioner; None without one.
        threshold: ‖r‖ at which the method may stop; None where it makes all its steps.
        damping: λ.
    """

    product: Product
    inverse: Product | None
    threshold: Float[Array, ""] | None
    damping: float

    def precondition(self, r: Vector) -> Vector:
        """M⁻¹ r."""
        return r if self.inverse is None else self.inverse(r)

    def unsolved(self, square: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether ‖r‖² is above the threshold, or NaN; True where there is none."""
        threshold = 0 if self.threshold is None else self.threshold
        return ~(jnp.sqrt(square) <= threshold)

    def curvature(self, p: Vector, quadratic: Float[Array, ""]) -> Float[Array, ""]:
        """pᵀA p / pᵀp from p and pᵀ(A + λ I) p."""
        square = dot(p, p)
        return quadratic / jnp.where(square > 0, square, 1) - self.damping


class Found(NamedTuple):
    """What a bare method returns.

    Attributes:
        value: x.
        curvature: the smallest pᵀA p / pᵀp met, infinite where none was looked at.
        iterations: products with A that went into x.
        products: all that were made; None for as many.
        status: see `Status`.
    """

    value: Vector
    curvature: Float[Array, ""]
    iterations: Int32[Array, ""]
    products: Int32[Array, ""] | None = None
    status: Int32[Array, ""] | int = 0


Method: TypeAlias = Callable[[Operator, Vector], tuple[Any, ...]]
"""(operator, b of norm 1) -> `Found`, or its first three fields."""


def dot(a: Vector, b: Vector) -> Float[Array, ""]:
    """aᵀb over whole trees."""
    return trees.dot(a, b)


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


@named
def make_solver(
    method: Method,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
    *,
    tolerance: float | None = None,
    absolute_tolerance: float = 0.0,
    symmetric: bool = False,
) -> LinearSolver:
    r"""Turn a bare method into a solver.

    The method solves
    $$(A + \lambda I) \, y = (b - (A + \lambda I) x_0) \,/\, \|\cdot\|, \qquad
      x = x_0 + \|\cdot\| \, y$$
    so it always sees a right-hand side of norm 1. A warm start x₀ that is further from the
    solution than zero is dropped.

    Args:
        method: the bare method.
        damping: λ, 0 or more.
        preconditioner: see `jacobi`, `nystrom` and `kronecker`.
        tolerance: the method may stop at ‖r‖ ≤ max(tolerance · ‖b‖, absolute_tolerance), with r
            the residual of the damped system; None: it makes all its steps.
        absolute_tolerance: 0 or more; read only where there is a `tolerance`.
        symmetric: whether the method needs a symmetric A. One that comes without a `problem`,
            whose Hessian would be symmetric, is then tested on two random vectors.

    Returns:
        The solver.

    Raises:
        ValueError: `damping` or a tolerance is negative.
    """
    checks.not_negative("damping", damping)
    if tolerance is not None:
        checks.not_negative("tolerance", tolerance)
    checks.not_negative("absolute_tolerance", absolute_tolerance)

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

        inverse, made = None, 0
        if preconditioner is not None:
            system = System(image, wide, damping, problem, params, context)
            inverse, made = preconditioner(system)
        target, norm = unit(wide)
        guess, target = _warm(damped, start, target, norm)
        rest = jnp.ones_like(norm)
        if start is not None:
            target, rest = unit(target)
        threshold = None
        if tolerance is not None:
            relative = jnp.maximum(tolerance, absolute_tolerance / jnp.where(norm > 0, norm, 1))
            threshold = relative / jnp.where(rest > 0, rest, 1)
        found = Found(*method(Operator(damped, inverse, threshold, damping), target))
        value = jax.tree.map(jnp.add, guess, scaled(rest, found.value))
        solution, left = _finish(image, b, scaled(norm, value), found)
        if inverse is not None:
            positive = is_positive(inverse, target) & is_positive(inverse, left)
            solution = _noted(solution, Status.PRECONDITIONER, ~positive)
        if symmetric and problem is None:
            made += 2
            solution = _noted(solution, Status.ASYMMETRIC, is_asymmetric(image, wide))
        return solution._replace(products=solution.products + made + int(start is not None))

    return solve


def _noted(solution: LinearSolution, status: Status, holds: Bool[Array, ""]) -> LinearSolution:
    return solution._replace(status=jnp.where(holds, jnp.int32(status), solution.status))


def _cast(tree: Vector, like: Vector) -> Vector:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


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
    image: Product, b: Vector, value: Vector, found: Found
) -> tuple[LinearSolution, Vector]:
    """The solution with its true residual, and what of b/‖b‖ is left."""
    value = jax.tree.map(lambda x, like: x.astype(like.dtype), value, b)
    # A solution too large for its dtype, or a system of NaN, would make what comes after NaN.
    representable = trees.all_finite(value) | ~trees.all_finite(b)
    value = jax.tree.map(lambda x: jnp.where(representable, x, 0), value)
    target, norm = unit(jax.tree.map(lambda x: x.astype(trees.accumulator(x.dtype)), b))
    reached = scaled(1 / jnp.where(norm > 0, norm, 1), _late(image, value))
    left = jax.tree.map(jnp.subtract, target, reached)
    residual = trees.norm(left)
    residual = jnp.where(jnp.isnan(residual) | ~representable, jnp.inf, residual)
    curvature = jnp.where(jnp.isnan(found.curvature), jnp.inf, found.curvature)
    # figures for the report: norms have no derivative at zero
    residual, curvature = jax.lax.stop_gradient((jnp.where(norm == 0, 0, residual), curvature))
    made = found.iterations if found.products is None else found.products
    curvature = curvature.astype(residual.dtype)
    return LinearSolution(
        value, residual, curvature, found.iterations, made + 1, found.status
    ), left


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


def repeat(
    operator: Operator,
    step: Callable[[Any], Any],
    unfinished: Callable[[Any], Bool[Array, ""]],
    start: Any,
    steps: int,
) -> tuple[Any, Int32[Array, ""]]:
    """All steps of a method under `lax.scan`; with a threshold as many as it needs.

    Args:
        operator: whose threshold is looked at.
        step: state -> state.
        unfinished: state -> whether another step would change it for the better.
        start: the first state.
        steps: how many at most.

    Returns:
        The last state, and the steps made.
    """
    if operator.threshold is None:
        state, _ = jax.lax.scan(lambda s, _: (step(s), None), start, length=steps)
        return state, jnp.int32(steps)
    # Under `vmap` the loop runs until its slowest task has ended, and `while_loop` itself keeps
    # what the others have found.
    made, state = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & unfinished(carry[1]),
        lambda carry: (carry[0] + 1, step(carry[1])),
        (jnp.int32(0), start),
    )
    return state, made

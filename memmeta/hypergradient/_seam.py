"""The interface of hypergradient estimators: what they are given and what they return."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree, UInt32

from memmeta._shared import trees
from memmeta._shared.readable import named
from memmeta.inner import InnerLoop
from memmeta.problem import Batch, MetaParams, Params, Problem


class Report(NamedTuple):
    """How far a hypergradient can be trusted, per task.

    A figure that the estimator has none of, or that was not asked for (see `make_meta_step`), is
    None. An infinite one is not known for that task.

    Attributes:
        inner_gradient_norm: ‖∇_φ g‖ just before the last inner step, zero when the inner loop has
            converged; infinite where no step was made.
        inner_reduction: that norm over the one before the first inner step (under a warm start of
            the task's life); infinite where no step was made.
        inner_steps: inner steps made; fewer than asked for where a tolerance stopped the loop.
        linear_residual: ‖∂_φ f − (∂²_φφ g) v̂‖ / ‖∂_φ f‖ of the linear system that was solved.
        linear_iterations: Hessian-vector products that went into v̂; with `implicit(tolerance=...)`
            all that were made in any round.
        linear_status: 0, or the number of what is wrong with the linear system (a product that is
            not symmetric or not finite, a preconditioner that is not positive), see
            `memmeta.linear_solve.LinearSolution`; of single tasks, never a mean.
        smallest_curvature: the smallest pᵀ(∂²_φφ g)p / pᵀp met; negative means that φ̂ is no minimum
            and the implicit function theorem does not hold.
        error_estimate: estimate of ‖∇̂F_i − ∇F_i‖, the distance from the hypergradient at the inner
            solution, measured in the context and, where φ₀ depends on θ, in φ₀; see
            `memmeta.certificate.estimate`. Of estimators that draw directions: of their mean. Needs
            `Problem.strong_convexity` or, for `implicit`, a positive curvature met by the solver.
        error_bound: a rigorous bound on the same error, where the problem gives its
            `strong_convexity` and `Structure.deviations`. In θ where `Deviations.embedding` bounds
            ‖∂c/∂θ‖, and its mean over tasks then bounds the error of the whole meta-step; where
            `embedding` is 1, as for linear heads, it bounds the error in c alone;
            `certificate.error_in_theta` takes it to θ.
        standard_error: estimate of the root mean square of ‖∇̂F_i − E ∇̂F_i‖, of estimators that
            draw directions.
        contraction: of `fixed_point`: the rate at which inner steps approach the fixed point, a
            lower estimate of the spectral radius of their derivative; 1 or more means that they do
            not, and that the rule does not hold.
    """

    inner_gradient_norm: Float[Array, "*tasks"] | None = None
    inner_reduction: Float[Array, "*tasks"] | None = None
    inner_steps: Float[Array, "*tasks"] | None = None
    linear_residual: Float[Array, "*tasks"] | None = None
    linear_iterations: Float[Array, "*tasks"] | None = None
    linear_status: Float[Array, "*tasks"] | None = None
    smallest_curvature: Float[Array, "*tasks"] | None = None
    error_estimate: Float[Array, "*tasks"] | None = None
    error_bound: Float[Array, "*tasks"] | None = None
    standard_error: Float[Array, "*tasks"] | None = None
    contraction: Float[Array, "*tasks"] | None = None


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """Which figures of a report are read; of the others an estimator need not trace anything.

    Attributes:
        figures: any at all.
        errors: `error_estimate` and `error_bound`, which take derivatives of their own.
    """

    figures: bool = True
    errors: bool = True


class Row(NamedTuple):
    """A row of a member's table, to be written there where it is finite.

    Attributes:
        number: which one.
        values: its leaves, those of the table without the axis of rows.
        before: what stands there.
    """

    number: Int32[Array, "*members"]
    values: Any
    before: Any


class Memory(NamedTuple):
    """What is kept of a member of a population, a task, from one meta-step to the next.

    Attributes:
        params: φ̂, where the next inner loop goes on.
        solver: the inner solver's own state; None where it is made anew.
        steps: inner steps made in this life; where 0, the next meta-step begins at `init`(θ).
        first_gradient_norm: ‖∇_φ g‖ before the first of them.
        key: the words of the member's own PRNG key, the same throughout a life, for views and
            solvers that draw; words, because NumPy has no keys.
        solution: v̂, where the next linear solve starts; None where the estimator has none.
        table: [rows, ...] of which a meta-step reads and writes one row, so that it costs the same
            however many there are; None where the estimator has none. What an estimator gives back
            in its place is the `Row` to be written.
    """

    params: Params
    solver: Any
    steps: Int32[Array, "*members"]
    first_gradient_norm: Float[Array, "*members"]
    key: UInt32[Array, "*members words"]
    solution: Any
    table: Any = None


class Chunk(NamedTuple):
    """Some tasks of a meta-step, as many as an estimator works on at once.

    Attributes:
        tasks: every leaf with a leading axis of tasks.
        weights: [tasks] w_i; 0 leaves a task out.
        numbers: [tasks] which tasks of the meta-step these are.
        key: the meta-step's key, the same for all chunks, so that chunking changes no draw.
        step: the meta-step's number.
        memory: what the estimator returned for the same tasks last time, see
            `memmeta.meta.WarmStart`; None starts afresh.
        wanted: which figures of the report are read; `wanted.errors` says whether an estimator
            need take the derivatives of an `error_estimate`.
    """

    tasks: Batch
    weights: Float[Array, " tasks"]
    numbers: Int32[Array, " tasks"]
    key: Key[Array, ""]
    step: Int32[Array, ""]
    memory: Memory | None = None
    wanted: Wanted = Wanted()

    @classmethod
    def of(
        cls,
        tasks: Batch,
        weights: Float[Array, " tasks"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> "Chunk":
        """A batch of tasks by itself, to call an estimator without a meta-step.

        Args:
            tasks: every leaf with a leading axis of tasks.
            weights: [tasks] w_i; default all 1.
            key: default `jax.random.key(0)`.

        Example:
            >>> Chunk.of(jnp.ones((3, 2))).weights.tolist()
            [1.0, 1.0, 1.0]
        """
        count = trees.leading_size(tasks, "tasks")
        weights = jnp.ones(count, jnp.float32) if weights is None else weights
        key = jax.random.key(0) if key is None else key
        return cls(tasks, weights, jnp.arange(count, dtype=jnp.int32), key, jnp.int32(0))


class Hypergradient(NamedTuple):
    """What an estimator returns for a chunk of tasks.

    Attributes:
        gradient: Σ_i w_i ∇F_i over the usable tasks, like the inexact leaves of the meta-parameters
            (None elsewhere).
        usable: [tasks] whether everything about the task was finite; the others are left out.
        loss: [tasks] f_i.
        aux: the outer losses' auxiliary outputs, each with a leading axis of tasks.
        report: see `Report`, each entry [tasks].
        memory: what is to be kept of each task, as in `Chunk`, where that had one.
    """

    gradient: MetaParams
    usable: Bool[Array, " tasks"]
    loss: Float[Array, " tasks"]
    aux: PyTree
    report: Report
    memory: Memory | None = None


@runtime_checkable
class Estimator(Protocol):
    """Estimates Σ_i w_i ∇F_i over a chunk of tasks, see `__call__`."""

    def __call__(
        self, problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        """Estimate the hypergradients of a chunk.

        Args:
            problem: the bilevel problem.
            inner: the inner loop.
            meta_params: θ.
            chunk: the tasks.

        Returns:
            Their weighted sum, and what is known of each.
        """
        ...


@named
def scheduled(at: Callable[[Int32[Array, ""]], Estimator]) -> Estimator:
    """An estimator that changes from one outer iteration to the next.

    Args:
        at: step (a traced int32) -> the estimator of that meta-step.

    Returns:
        The estimator.

    Example:
        >>> import memmeta as mm
        >>> tightening = scheduled(
        ...     lambda step: mm.hypergradient.implicit(tolerance=1 / (1.0 + step) ** 2)
        ... )
    """

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        return at(chunk.step)(problem, inner, meta_params, chunk)

    return estimator

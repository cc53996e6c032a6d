"""The meta-step: hypergradients of chunks of tasks summed in a scan, one outer update, one jit."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int32, Key

from memmeta import hypergradient
from memmeta._shared import checks, trees
from memmeta.hypergradient import Chunk, Estimator
from memmeta.hypergradient._seam import Memory, Wanted
from memmeta.inner import InnerLoop
from memmeta.inner._solver import about, as_transformation
from memmeta.meta._compiling import said_if_long
from memmeta.meta._explain import explain, in_trouble
from memmeta.meta._first_look import first_look, require_arrays
from memmeta.meta._mesh import (
    TASKS,
    automatic,
    mesh_of_tasks,
    place,
    shards,
    specs,
    spread,
    untyped,
    without_types,
)
from memmeta.meta._metrics import (
    DEFAULT_GUARD,
    Guard,
    Metrics,
    Sums,
    TaskMetrics,
    averages,
    report_of,
    sums,
    with_refused,
)
from memmeta.meta._state import DRAWS, MetaState, require_state
from memmeta.problem import Batch, MetaParams, Problem, Scalar

TaskChunk: TypeAlias = int | Literal["auto"] | None
"""Tasks worked on at once on each device; None: all; "auto": what the platform is fastest at."""

ReportLevel: TypeAlias = Literal["full", "light", "none"]
"""Figures that a meta-step reports: all; those that are at hand; only the losses."""

NUMBERS_AT_ONCE = 32_768
"""On a CPU "auto" takes the largest chunk of tasks with at most so many numbers, at least one task.

`benchmarks.cost.chunks`: a convolutional network's tasks (60,000 numbers) are fastest one at a
time, in the cache; a small dense one's (50 numbers) up to three times faster all at once. A GPU or
TPU, slow at many small steps, takes all.
"""

METRICS = Metrics._make([P()] * 6 + [P(TASKS)])
"""How metrics are sharded."""


@dataclass(frozen=True)
class MetaStep:
    """One outer iteration: call it, or trace `update` in a program of your own.

    Its attributes are the arguments of `make_meta_step`; and over how many `devices` it spreads
    tasks.
    """

    problem: Problem
    inner: InnerLoop
    estimator: Estimator
    optimizer: optax.GradientTransformationExtraArgs
    task_chunk: TaskChunk = "auto"
    mesh: Mesh | None = None
    guard: Guard | None = DEFAULT_GUARD
    strict: bool = False
    report: ReportLevel = "light"
    check_tasks: bool = True
    devices: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kinds = {
            "problem": (Problem, "a memmeta.Problem"),
            "inner": (InnerLoop, "a memmeta.InnerLoop"),
            "guard": (Guard | None, "a guard of memmeta.meta.guard, or None"),
        }
        for name, (kind, expected) in kinds.items():
            found = getattr(self, name)
            checks.require(name, found, isinstance(found, kind), expected)
        name = getattr(self.estimator, "__name__", "")
        is_factory = getattr(hypergradient, name or " ", None) is self.estimator
        expected = f"an estimator, which {name}() makes" if is_factory else "an estimator"
        fits = callable(self.estimator) and not is_factory
        remedy = "Call one of memmeta.hypergradient, for instance implicit()."
        checks.require("estimator", self.estimator, fits, expected, remedy)
        if self.task_chunk not in (None, "auto"):
            checks.count("task_chunk", self.task_chunk)
        checks.one_of("report", self.report, get_args(ReportLevel))
        told = not self.strict or self.report != "none"
        expected = '"light" or "full" for a strict step, which says what went wrong'
        checks.require("report", self.report, told, expected)
        object.__setattr__(self, "mesh", mesh_of_tasks(self.mesh))
        object.__setattr__(self, "devices", shards(self.mesh))

    def init(self, meta_params: MetaParams, key: Key[Array, ""] | None = None) -> MetaState:
        """The state of a new run.

        Args:
            meta_params: θ at the start. Copied: the state is donated at each step, θ stays yours.
                With a mesh, arrays sharded over it stay so; the others get a copy on every device.
            key: PRNG key of the run; default `jax.random.key(0)`.

        Returns:
            The state at step 0.

        Raises:
            ValueError: θ has no leaf that can be differentiated, or `key` is no single key.
        """
        require_arrays("meta_params", meta_params)
        floats, _ = trees.split_inexact(meta_params)
        if not jax.tree.leaves(floats):
            raise ValueError(
                "meta_params: found no floating-point leaf, expected at least one array to learn."
            )
        key = jax.random.key(0) if key is None else key
        single = jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key) and key.shape == ()
        checks.require("key", key, single, "one jax.random.key(...)")
        placed, key = place(self.mesh and automatic(self.mesh), (meta_params, key))
        with untyped(self.mesh):
            copied = jax.tree.map(jnp.array, placed)
            floats, _ = trees.split_inexact(copied)
            # Copied too: some optimisers keep one array twice, and both would be donated.
            optimizer = jax.tree.map(jnp.array, self.optimizer.init(floats))
            guard = self.guard and self.guard.init(
                jnp.zeros((), jax.eval_shape(trees.norm, floats).dtype)
            )
            state = MetaState(jnp.int32(0), copied, optimizer, jnp.copy(key), guard)
        on_mesh: MetaState = place(self.mesh, state)
        return on_mesh

    def __call__(self, state: MetaState, tasks: Batch) -> tuple[MetaState, Metrics]:
        """One compiled meta-step; `state` is donated, unless the step is `strict`.

        Args:
            state: from `init` or the previous call.
            tasks: one batch of tasks, a pytree whose leaves have a leading axis of tasks. With a
                mesh, those that are not yet spread over its devices are sent there.

        Returns:
            The next state, and the metrics of this step.

        Raises:
            ValueError: `state` is no state, or one that a former call has used up; the tasks have
                no common leading axis, the devices or `task_chunk` do not divide it, or one of the
                problem's functions does not return what it should.
            FloatingPointError: the step is `strict` and something went wrong; see `explain`.
        """
        require_state(state)
        unmet = self._look(state, tasks)
        with said_if_long("the meta-step") if unmet else nullcontext():
            following, metrics = self.compiled(state, place(self.mesh, tasks, P(TASKS)))
        if self.strict and in_trouble(metrics):
            raise FloatingPointError(explain(metrics))
        return following, metrics

    def _look(self, state: MetaState, tasks: Batch) -> bool:
        """`first_look` at a batch of shapes that this object has not met before; whether it is."""
        leaves, structure = jax.tree.flatten(tasks)
        met = structure, tuple(_kind(leaf) for leaf in leaves)
        if met not in self._met:
            self.chunk(tasks)
            with untyped(self.mesh):
                first_look(self.problem, self.inner, state.meta_params, tasks)
            self._met.add(met)
            return True
        return False

    @cached_property
    def _met(self) -> set[Any]:
        return set()

    @cached_property
    def compiled(self) -> Callable[[MetaState, Batch], tuple[MetaState, Metrics]]:
        """`update` under `jax.jit` with the state donated; `.lower(...)` shows what it costs."""
        return jax.jit(self.update, donate_argnums=() if self.strict else 0)

    def update(self, state: MetaState, tasks: Batch) -> tuple[MetaState, Metrics]:
        """`__call__` as a pure function that is not yet compiled."""

        def updated(state: MetaState, tasks: Batch) -> tuple[MetaState, Metrics]:
            following, metrics, _ = self.update_remembering(state, tasks, None)
            return following, metrics

        if self.mesh is None:
            return updated(state, tasks)
        out = (specs(state), METRICS)
        found: tuple[MetaState, Metrics] = without_types(self.mesh, updated, out)(state, tasks)
        return found

    def update_remembering(
        self, state: MetaState, tasks: Batch, memory: Memory | None
    ) -> tuple[MetaState, Metrics, Memory | None]:
        """`update` with what the estimator returned for these tasks last time."""
        gradient, metrics, memory = self.gradient_remembering(state, tasks, memory)
        floats, others = trees.split_inexact(state.meta_params)
        known = about(metrics.loss, gradient, self._objective(state, tasks))
        with jax.numpy_dtype_promotion("standard"):  # as in `from_optax`
            updates, optimizer = self.optimizer.update(gradient, state.optimizer, floats, **known)
            proposed = (optax.apply_updates(floats, updates), optimizer)
        # without a usable task there is no gradient to follow
        keep, guard = metrics.used > 0, state.guard
        if self.guard is not None and guard is not None:
            accepted, guard = self.guard.accepts(guard, metrics.gradient_norm, proposed)
            refused = (keep & ~accepted).astype(jnp.int32)
            metrics, keep = with_refused(metrics, refused), keep & accepted
        floats, optimizer = trees.where(keep, proposed, (floats, state.optimizer))
        theta = trees.merge(floats, others)
        following = MetaState(state.step + 1, theta, optimizer, state.key, guard)
        return following, metrics, memory

    def _objective(self, state: MetaState, tasks: Batch) -> Callable[[MetaParams], Scalar]:
        """The mean outer loss as a function of θ, for line searches; its gradient is estimated."""
        _, others = trees.split_inexact(state.meta_params)

        def both(floats: MetaParams) -> tuple[Scalar, MetaParams]:
            there = state._replace(meta_params=trees.merge(floats, others))
            gradient, metrics = self.gradient(there, tasks)
            return metrics.loss, gradient

        @jax.custom_vjp
        def objective(floats: MetaParams) -> Scalar:
            return both(floats)[0]

        def backward(gradient: MetaParams, scale: Scalar) -> tuple[MetaParams]:
            return (jax.tree.map(lambda g: scale.astype(g.dtype) * g, gradient),)

        objective.defvjp(both, backward)
        return objective

    def gradient(self, state: MetaState, tasks: Batch) -> tuple[MetaParams, Metrics]:
        r"""The mean hypergradient of a batch, accumulated chunk by chunk.

        $$\frac{1}{n} \sum_{\text{chunks}} \sum_{i \in \text{chunk}} \nabla F_i$$

        Args:
            state: θ and the PRNG key are used.
            tasks: one batch of tasks.

        Returns:
            The gradient, like the inexact leaves of θ, and the metrics.
        """

        def both(state: MetaState, tasks: Batch) -> tuple[MetaParams, Metrics]:
            gradient, metrics, _ = self.gradient_remembering(state, tasks, None)
            return gradient, metrics

        if self.mesh is None:
            return both(state, tasks)
        out = (specs(trees.split_inexact(state.meta_params)[0]), METRICS)
        found: tuple[MetaParams, Metrics] = without_types(self.mesh, both, out)(state, tasks)
        return found

    def gradient_remembering(
        self, state: MetaState, tasks: Batch, memory: Memory | None
    ) -> tuple[MetaParams, Metrics, Memory | None]:
        """`gradient` with what the estimator returned for these tasks last time."""
        sums_of: Callable[..., Any] = partial(self._sums, self.chunk(tasks))
        if self.mesh is not None:
            sums_of = spread(self.mesh, sums_of, split=3, out=(False, True, True))
        draw = jax.random.fold_in(jax.random.fold_in(state.key, DRAWS), state.step)
        numbers = jnp.arange(trees.leading_size(tasks, "tasks"), dtype=jnp.int32)
        whole = (state.meta_params, draw, state.step)
        total, per_task, memory = sums_of(*whole, tasks, numbers, memory)
        share = 1 / jnp.maximum(total.counts[0], 1)
        gradient = jax.tree.map(
            lambda g, like: (share.astype(g.dtype) * g).astype(like.dtype),
            total.gradient,
            trees.split_inexact(state.meta_params)[0],
        )
        return gradient, averages(total, gradient, per_task), memory

    def _sums(
        self,
        chunk: int,
        meta_params: MetaParams,
        draw: Key[Array, ""],
        step: Int32[Array, ""],
        tasks: Batch,
        numbers: Int32[Array, " tasks"],
        memory: Memory | None,
    ) -> tuple[Sums, TaskMetrics, Memory | None]:
        """One device's tasks, chunk by chunk; then the sums of all devices in one message."""
        count = numbers.size
        wanted = Wanted(figures=self.report != "none", errors=self.report == "full")

        def one_chunk(some: Batch, chosen: Array, remembered: Memory | None) -> tuple[Any, Any]:
            finite = jnp.ones(chunk, bool)
            if self.check_tasks:
                finite = jax.vmap(trees.all_finite)(some)
                some = jax.tree.map(_zero_where_not(finite), some)
            weights = finite.astype(jnp.float32)
            part = Chunk(some, weights, chosen, draw, step, remembered, wanted)
            found = self.estimator(self.problem, self.inner, meta_params, part)
            # A product of finite cotangents can still overflow in the pull-back, where tasks cannot
            # be told apart: the whole chunk is left out.
            sound = trees.all_finite(found.gradient)
            kept = jax.tree.map(
                lambda g: jnp.where(sound, g, 0).astype(trees.accumulator(g.dtype)), found.gradient
            )
            usable = found.usable & sound
            report = report_of(found.report, wanted)
            per_task = TaskMetrics(found.loss, found.aux, report, usable, finite)
            return kept, (per_task, found.memory)

        def add_chunk(total: MetaParams, first: Int32[Array, ""]) -> tuple[MetaParams, Any]:
            # Cut out here, and blanked above: the whole batch is never copied.
            cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=chunk)
            kept, found = one_chunk(*jax.tree.map(cut, (tasks, numbers, memory)))
            return jax.tree.map(jnp.add, total, kept), found

        if chunk == count:
            total, (per_task, memory) = one_chunk(tasks, numbers, memory)
        else:
            floats, _ = trees.split_inexact(meta_params)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, trees.accumulator(x.dtype)), floats)
            firsts = jnp.arange(0, count, chunk, dtype=jnp.int32)
            total, (per_task, memory) = jax.lax.scan(add_chunk, zeros, firsts)
            per_task, memory = jax.tree.map(
                lambda x: x.reshape(count, *x.shape[2:]), (per_task, memory)
            )
        summed = sums(total, per_task, numbers[0] // count, self.devices)
        if self.devices > 1:
            # XLA (jax 0.10.2) would send a sum that is known early in an all-reduce of its own;
            # behind the barrier all travel in one.
            summed = jax.lax.psum(jax.lax.optimization_barrier(summed), TASKS)
        return summed, per_task, memory

    def chunk(self, tasks: Batch) -> int:
        """How many tasks are worked on at once on each device.

        Args:
            tasks: one batch of tasks, or its shapes.

        Returns:
            `task_chunk` with "auto" and None made a number.

        Raises:
            ValueError: the tasks cannot be shared out evenly over devices or chunks.
        """
        count = trees.leading_size(tasks, "tasks")
        devices = self.devices
        if count == 0:
            raise ValueError("tasks: expected at least one task, found 0.")
        if count % devices:
            raise ValueError(
                f"tasks: expected a multiple of the {devices} devices they are spread over, found "
                f"{count}."
            )
        local = count // devices
        divisors = [size for size in range(1, local + 1) if local % size == 0]
        if self.task_chunk == "auto" and jax.default_backend() == "cpu":
            each = sum(leaf.size for leaf in jax.tree.leaves(tasks)) / count
            return max(size for size in divisors if size == 1 or size * each <= NUMBERS_AT_ONCE)
        if not isinstance(self.task_chunk, int):
            return local
        if local % self.task_chunk:
            raise ValueError(
                f"task_chunk: {self.task_chunk} does not divide the {local} tasks of a step on "
                f"each device. Choose one of {', '.join(map(str, divisors))}, or None for all at "
                "once."
            )
        return self.task_chunk


def _kind(leaf: Any) -> tuple[Any, Any]:
    """What tells tasks of other programs apart: shape and dtype; of no array, its type."""
    return (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else (np.shape(leaf), type(leaf))


def _zero_where_not(finite: Bool[Array, " tasks"]) -> Callable[[Array], Array]:
    """Zero inputs that are not finite: 0 · NaN in a pull-back would make the whole gradient NaN."""

    def blank(leaf: Array) -> Array:
        if not trees.is_inexact(leaf):
            return leaf
        return jnp.where(finite.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, 0)

    return blank


def make_meta_step(
    problem: Problem,
    inner: InnerLoop,
    estimator: Estimator,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    task_chunk: TaskChunk = "auto",
    mesh: Mesh | None = None,
    guard: Guard | None = DEFAULT_GUARD,
    strict: bool = False,
    report: ReportLevel = "light",
    check_tasks: bool = True,
) -> MetaStep:
    r"""Make the function that does one outer iteration.

    $$\theta_{t+1} = \theta_t - \text{optimizer}\Big(\frac1n \sum_i \nabla F_i(\theta_t)\Big)$$

    Args:
        problem: the bilevel problem.
        inner: the inner loop.
        estimator: of the hypergradient, from `memmeta.hypergradient`; `scheduled` to let it change
            with the outer iteration.
        optimizer: the outer optimiser, any optax gradient transformation.
        task_chunk: tasks worked on at once on each device. Memory grows with it, and not with the
            number of tasks; it changes nothing but rounding. "auto" takes what the platform is
            fastest at (see `NUMBERS_AT_ONCE`), None all.
        mesh: the devices to spread tasks over, along its axis named "tasks" (see
            `memmeta.meta.task_mesh`); changes nothing but rounding. Devices exchange one sum a
            meta-step. Parameters are on every device, unless θ is given to `init` sharded over a
            further axis of the mesh: then so are the optimiser's state, whatever of φ, the inner
            state and the solver's vectors comes of θ, and tasks that are given so; the compiler
            adds what communication the model needs. The problem's functions may name that axis in
            `jax.lax.with_sharding_constraint(x, P("model"))`. Axes of type Explicit, the default of
            `jax.make_mesh`, are taken as they are: results have such types again, the problem's
            functions see none. None means one device.
        guard: refuses updates that are not finite, or that follow an unusually large gradient; see
            `memmeta.meta.guard`. None follows all updates.
        strict: raise a FloatingPointError with the sentence of `memmeta.meta.explain` whenever a
            task is left out, a loop or a solve is too short, or an update is refused. For finding
            out what is wrong: each call waits for its metrics, and the state is not donated.
        report: what the metrics hold; what is not asked for is not in the compiled program. "light"
            has all figures that are at hand, and counts all trouble; "full" adds `error_estimate`
            and `error_bound`, which take derivatives of their own; "none" has losses, the
            gradient's norm, and the numbers of tasks left out and updates refused.
        check_tasks: look in every meta-step for tasks whose own data are not finite. That reads all
            data, which a step on a few rows of each does not: False for data known to be finite.

    Returns:
        A `MetaStep`: `init(meta_params) -> state`, `step(state, tasks) -> (state, metrics)`.

    Raises:
        ValueError: `task_chunk` is less than 1, or `mesh` has no axis named "tasks"; or another
            argument is not what it should be.

    Source: Yang, Ma, Yu (AAAI 2025), Algorithm 1.

    Example:
        >>> import optax, memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, batch: (theta, batch),
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c[0]) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c[1]) ** 2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> step = make_meta_step(
        ...     problem, mm.InnerLoop(steps=10), mm.hypergradient.implicit(), optax.sgd(0.5)
        ... )
        >>> state = step.init(jnp.zeros(2))
        >>> for _ in range(20):
        ...     state, metrics = step(state, jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> state.meta_params.round(2).tolist()
        [2.0, 3.0]
    """
    transformation = as_transformation("optimizer", optimizer)
    options = (task_chunk, mesh, guard, strict, report, check_tasks)
    return MetaStep(problem, inner, estimator, transformation, *options)

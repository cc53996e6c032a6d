"""The meta-step: hypergradients of chunks of tasks summed in a scan, one outer update, one jit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int32, Key

from memmeta import devices, trees
from memmeta.hypergradient.estimator import Estimator
from memmeta.hypergradient.warm import Scheduled
from memmeta.inner import InnerLoop
from memmeta.metrics import Metrics, Sums, TaskMetrics, averages, sums
from memmeta.problem import Batch, MetaParams, Problem, Scalar

TaskChunk: TypeAlias = int | Literal["auto"] | None
"""Tasks worked on at once on each device; None: all; "auto": what the platform is fastest at."""

NUMBERS_AT_ONCE = 32_768
"""On a CPU "auto" takes as many tasks as hold so many numbers, and one that holds more by itself.

`benchmarks.chunks`: a convolutional network's tasks (60,000 numbers) are fastest one at a time, in
the cache; a small dense one's (50 numbers) up to three times faster all at once. A GPU or TPU, slow
at many small steps, takes all.
"""

EXPLODING = 1000.0
"""A meta-gradient this many times longer than usual is not followed."""


class MetaState(NamedTuple):
    """Everything a run carries from one meta-step to the next, as one pytree.

    Attributes:
        step: meta-steps done.
        meta_params: θ.
        optimizer: state of the outer optimiser.
        key: PRNG key of the run; every random draw of step t comes from fold_in(key, t).
        usual: geometric running mean of the meta-gradient's norm; zero before the first.
    """

    step: Int32[Array, ""]
    meta_params: MetaParams
    optimizer: optax.OptState
    key: Key[Array, ""]
    usual: Scalar


@dataclass(frozen=True)
class MetaStep:
    """One outer iteration, made by `make_meta_step`; call it, or trace `update` in a program.

    Attributes:
        problem: the bilevel problem.
        inner: the inner loop.
        estimator: of the hypergradient.
        optimizer: the outer optimiser.
        task_chunk: tasks worked on at once on each device, see `TaskChunk`.
        mesh: the devices tasks are spread over, along its axis "tasks"; None means one device.
    """

    problem: Problem
    inner: InnerLoop
    estimator: Estimator | Scheduled
    optimizer: optax.GradientTransformation
    task_chunk: TaskChunk = "auto"
    mesh: Mesh | None = None

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
        floats, _ = trees.split_inexact(meta_params)
        if not jax.tree.leaves(floats):
            raise ValueError(
                "meta_params: found no floating-point leaf, expected at least one array to learn."
            )
        key = _checked_key(jax.random.key(0) if key is None else key)
        copied = devices.place(self.mesh, jax.tree.map(jnp.array, meta_params))
        optimizer = self.optimizer.init(trees.split_inexact(copied)[0])
        usual = jnp.zeros((), jax.eval_shape(trees.norm, floats).dtype)
        state = MetaState(jnp.int32(0), copied, optimizer, jnp.copy(key), usual)
        return devices.place(self.mesh, state)

    def __call__(self, state: MetaState, tasks: Batch) -> tuple[MetaState, Metrics]:
        """One compiled meta-step; `state` is donated.

        Args:
            state: from `init` or the previous call.
            tasks: one batch of tasks, a pytree whose leaves have a leading axis of tasks. With a
                mesh, those that are not yet spread over its devices are sent there.

        Returns:
            The next state, and the metrics of this step.

        Raises:
            ValueError: the tasks have no common leading axis, or the devices or `task_chunk` do not
                divide it.
        """
        self.chunk(tasks)
        return self.compiled(state, devices.place(self.mesh, tasks, P(devices.TASKS)))

    @cached_property
    def compiled(self) -> Callable[[MetaState, Batch], tuple[MetaState, Metrics]]:
        """`update` under `jax.jit` with the state donated; `.lower(...)` shows what it costs."""
        return jax.jit(self.update, donate_argnums=0)

    def update(self, state: MetaState, tasks: Batch) -> tuple[MetaState, Metrics]:
        """`__call__` as a pure function that is not yet compiled."""
        gradient, metrics = self.gradient(state, tasks)
        floats, others = trees.split_inexact(state.meta_params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, users may be strict
            updates, optimizer = self.optimizer.update(gradient, state.optimizer, floats)
            updated = (optax.apply_updates(floats, updates), optimizer)
        any_usable = metrics.counts.masked < trees.leading_size(tasks, "tasks")
        usual, exploding = _follow(state.usual, metrics.gradient_norm, any_usable)
        floats, optimizer = jax.tree.map(
            lambda new, old: jnp.where(any_usable & ~exploding, new, old),
            updated,
            (floats, state.optimizer),
        )
        theta = trees.merge(floats, others)
        following = MetaState(state.step + 1, theta, optimizer, state.key, usual)
        counts = metrics.counts._replace(exploding=exploding.astype(jnp.int32))
        return following, metrics._replace(counts=counts)

    def gradient(self, state: MetaState, tasks: Batch) -> tuple[MetaParams, Metrics]:
        r"""The mean hypergradient of a batch, accumulated chunk by chunk.

        $$\frac{1}{n} \sum_{\text{chunks}} \sum_{i \in \text{chunk}} \nabla F_i$$

        Args:
            state: θ and the PRNG key are used.
            tasks: one batch of tasks.

        Returns:
            The gradient, like the inexact leaves of θ, and the metrics.
        """
        sums_of = partial(self._sums, self.chunk(tasks))
        draw = jax.random.fold_in(state.key, state.step)
        numbers = jnp.arange(trees.leading_size(tasks, "tasks"), dtype=jnp.int32)
        spread = devices.spread(self.mesh, sums_of, split=2, out=(False, True))
        total, per_task = spread(state.meta_params, draw, state.step, tasks, numbers)
        used = jnp.maximum(total.used, 1)
        gradient = jax.tree.map(
            lambda g, like: (g / used.astype(g.dtype)).astype(like.dtype),
            total.gradient,
            trees.split_inexact(state.meta_params)[0],
        )
        return gradient, averages(total, gradient, per_task)

    def _sums(
        self,
        chunk: int,
        meta_params: MetaParams,
        draw: Key[Array, ""],
        step: Int32[Array, ""],
        tasks: Batch,
        numbers: Int32[Array, " tasks"],
    ) -> tuple[Sums, TaskMetrics]:
        """One device's tasks, chunk by chunk; then the sums of all devices in one message."""
        count = numbers.size
        given = self.estimator
        estimator: Estimator = given.at(step) if isinstance(given, Scheduled) else given

        def add_chunk(total: MetaParams, first: Int32[Array, ""]) -> tuple[MetaParams, TaskMetrics]:
            # Cut out here, and blanked here: the whole batch is never copied.
            some = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, chunk), tasks)
            finite = jax.vmap(trees.all_finite)(some)
            some = jax.tree.map(_zero_where_not(finite), some)
            weights = finite.astype(jnp.float32)
            found = estimator(self.problem, self.inner, meta_params, some, weights, draw)
            # The last resort: a product that overflowed in the pull-back of finite cotangents.
            sound = trees.all_finite(found.gradient)
            total = jax.tree.map(
                lambda t, g: t + jnp.where(sound, g, 0).astype(t.dtype), total, found.gradient
            )
            usable = found.usable & sound
            return total, TaskMetrics(found.loss, found.aux, found.report, usable, found.memory)

        floats, _ = trees.split_inexact(meta_params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, trees.accumulator(x.dtype)), floats)
        firsts = jnp.arange(0, count, chunk, dtype=jnp.int32)
        total, per_task = jax.lax.scan(add_chunk, zeros, firsts)
        per_task = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), per_task)
        shards = devices.shards(self.mesh)
        summed = sums(total, per_task, numbers[0] // count, shards)
        if shards > 1:
            # The barrier keeps them together: a sum that is known early would travel alone.
            summed = jax.lax.psum(jax.lax.optimization_barrier(summed), devices.TASKS)
        return summed, per_task

    def chunk(self, tasks: Batch) -> int:
        """How many tasks are worked on at once on each device.

        Args:
            tasks: one batch of tasks, or its shapes.

        Returns:
            `task_chunk` with "auto" and None made a number.

        Raises:
            ValueError: the tasks cannot be shared out evenly over devices or chunks.
        """
        count, shards = trees.leading_size(tasks, "tasks"), devices.shards(self.mesh)
        if count == 0:
            raise ValueError("tasks: found no task, expected at least one.")
        if count % shards:
            raise ValueError(
                f"tasks: found {count}, expected a multiple of the {shards} devices they are "
                "spread over."
            )
        local = count // shards
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


def _follow(
    usual: Scalar, length: Scalar, any_usable: Bool[Array, ""]
) -> tuple[Scalar, Bool[Array, ""]]:
    """The running mean of the gradient's norm, and whether this one is far off.

    The mean is geometric and takes in the lengths of refused gradients too: should they stay long,
    they are the usual ones after a few steps.
    """
    known = usual > 0
    exploding = any_usable & ~(length <= jnp.where(known, EXPLODING * usual, jnp.inf))
    drawn = usual * (length / jnp.where(known, usual, 1)) ** 0.1
    followed = jnp.where(known, drawn, length)
    sound = any_usable & (length > 0) & jnp.isfinite(followed)
    return jnp.where(sound, followed, usual), exploding


def _zero_where_not(finite: Bool[Array, " tasks"]) -> Callable[[Array], Array]:
    """Blank the inputs of non-finite tasks: 0 · NaN in a pull-back would poison the other tasks."""

    def blank(leaf: Array) -> Array:
        if not trees.is_inexact(leaf):
            return leaf
        return jnp.where(finite.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, 0)

    return blank


def _checked_key(key: Any) -> Key[Array, ""]:
    if not (jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise ValueError(f"key: expected one jax.random.key(...), found {key!r}.")
    return key


def make_meta_step(
    problem: Problem,
    inner: InnerLoop,
    estimator: Estimator | Scheduled,
    optimizer: optax.GradientTransformation,
    *,
    task_chunk: TaskChunk = "auto",
    mesh: Mesh | None = None,
) -> MetaStep:
    r"""Make the function that does one outer iteration.

    $$\theta_{t+1} = \theta_t - \text{optimizer}\Big(\frac1n \sum_i \nabla F_i(\theta_t)\Big)$$

    Args:
        problem: the bilevel problem.
        inner: the inner loop.
        estimator: of the hypergradient, from `memmeta.hypergradient`; `Scheduled` to let it change
            with the outer iteration.
        optimizer: the outer optimiser, any optax gradient transformation.
        task_chunk: tasks worked on at once on each device. Memory grows with it, and not with the
            number of tasks; it changes nothing but rounding. "auto" takes what the platform is
            fastest at (see `NUMBERS_AT_ONCE`), None all.
        mesh: the devices to spread tasks over, along its axis named "tasks" (see
            `memmeta.devices.task_mesh`); changes nothing but rounding. Devices exchange one sum a
            meta-step. Parameters are on every device; those of a model that does not fit may be
            sharded over a further axis of the mesh, given so to `init`, and the compiler then adds
            what communication the model needs. None means one device.

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
    _require("problem", problem, isinstance(problem, Problem), "a memmeta.Problem")
    _require("inner", inner, isinstance(inner, InnerLoop), "a memmeta.InnerLoop")
    fits = isinstance(estimator, Scheduled) or callable(estimator)
    _require("estimator", estimator, fits, "one of memmeta.hypergradient")
    fits = isinstance(optimizer, optax.GradientTransformation)
    _require("optimizer", optimizer, fits, "an optax gradient transformation")
    fits = task_chunk in (None, "auto") or (isinstance(task_chunk, int) and task_chunk >= 1)
    _require("task_chunk", task_chunk, fits, '"auto", None or at least 1')
    return MetaStep(problem, inner, estimator, optimizer, task_chunk, devices.checked(mesh))


def _require(name: str, found: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {found!r}.")

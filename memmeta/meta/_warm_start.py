"""State that lives across meta-steps: inner loops that go on where each was left.

With it the deterministic algorithm converges to the exact solution at a fixed number of inner and
linear steps; from a cold start a bias remains, which depends on those numbers.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Key, PyTree

from memmeta._shared import checks, trees
from memmeta.hypergradient import Chunk
from memmeta.hypergradient._estimator import as_keys, over_tasks
from memmeta.hypergradient._seam import Memory, Row
from memmeta.inner._loop import widened
from memmeta.meta._first_look import shape_of
from memmeta.meta._mesh import (
    TASKS,
    automatic,
    place,
    put,
    shards,
    specs,
    untyped,
    without_types,
)
from memmeta.meta._metrics import Metrics, TaskMetrics, with_reset
from memmeta.meta._reset import Reset
from memmeta.meta._state import DRAWS, MetaState, require_state
from memmeta.meta._step import METRICS, MetaStep
from memmeta.problem import Batch, MetaParams

LIVES = 2**31 - 2
"""What keeps the keys of members and of their next lives apart from all other draws."""


class WarmState(NamedTuple):
    """Everything a warm-started run carries from one meta-step to the next.

    Attributes:
        meta: of the meta-step underneath.
        memory: what is kept of all members, every leaf [size, ...]: `params` φ, `solver` (the inner
            solver's own state), `steps`, `solution` v, and more. NumPy arrays where `on_host`.
    """

    meta: MetaState
    memory: Memory


@dataclass(frozen=True)
class WarmStart:
    r"""A meta-step over a finite set of tasks, each of which goes on from where it was left.

    $$(\phi_i, s_i)^{t+1} = \text{inner}\big((\phi_i, s_i)^t\big), \qquad
      v_i^{t+1} = \text{solver}(v_i^t)$$

    Each meta-step makes a window of `InnerLoop.steps` further steps, from the last φ_i, with the
    inner solver's own state s_i and the member's count of steps, so that views go on through their
    epochs. Its hypergradient is that of the window: what is remembered counts as a constant, and
    `init`(θ) is differentiated in a member's first window alone. A population of inner models is a
    set of tasks, alike or not.

    Costs `memory_bytes`, spread over the devices of the meta-step's mesh or in the host's memory,
    whatever the number of windows. Wraps a meta-step and is no option of it, because its state is
    larger and its call takes the tasks' numbers. The meta-step inside serves fresh tasks, for
    evaluation or an infinite set, from a cold start: `step.step(state.meta, tasks)`.

    Solvers whose state is measured at one θ (`gradient_descent`, `accelerated`) measure anew in
    each window, and `sample_space` makes any solver's state anew.

    Attributes:
        step: made by `make_meta_step`, with any estimator.
        size: tasks in the set; with a mesh a multiple of its devices, unless `on_host`.
        on_host: keep the memory outside the devices; each call moves the rows of its tasks.
        reset: (key, steps, report) -> whether a member begins anew, for instance `reset_every` or
            `lifetimes`. A member whose φ, v or outer loss is not finite always does, and is counted
            in `metrics.counts.reset`. A new life begins at `init` of the θ of its time.

    Raises:
        ValueError: `size` is not positive, or the devices cannot share it out evenly.

    Source: the warm starts of AmIGO (Arbel and Mairal, ICLR 2022); windows of a population with
    restarts: Calian et al., "DataRater: Meta-Learned Dataset Curation" (2025), section 3.

    Example:
        >>> import optax, memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, target: (theta, target),
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * (phi - c[0]) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c[1]) ** 2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> implicit = mm.hypergradient.implicit(mm.linear_solve.cg(1))
        >>> cold = mm.make_meta_step(problem, mm.InnerLoop(steps=1), implicit, optax.sgd(0.1))
        >>> step, tasks = WarmStart(cold, size=2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> state = step.init(jnp.zeros(2), tasks)
        >>> for _ in range(200):
        ...     state, metrics = step(state, tasks)
        >>> state.meta.meta_params.round(2).tolist()
        [2.0, 3.0]
    """

    step: MetaStep
    size: int
    on_host: bool = False
    reset: Reset | None = None

    def __post_init__(self) -> None:
        checks.count("size", self.size)
        if self.reset is not None:
            checks.arguments("reset", self.reset, 3)
        count = shards(self.step.mesh)
        if not self.on_host and self.size % count:
            raise ValueError(
                f"size: found {self.size}, expected a multiple of the {count} devices the memory "
                f"is spread over. Round it up to {-(-self.size // count) * count} (a row that no "
                "task has costs its memory and nothing else), or keep it on_host."
            )

    def init(
        self, meta_params: MetaParams, tasks: Batch, key: Key[Array, ""] | None = None
    ) -> WarmState:
        """The state of a new run: every φ_i at `problem.init`, no step made, every v_i zero.

        Args:
            meta_params: θ at the start.
            tasks: a batch of tasks with a leading axis; only shapes are used, and may be given.
            key: PRNG key of the run.

        Returns:
            The state: `meta`, that of the meta-step inside, and `memory`, that of all members.
        """
        meta, mesh = self.step.init(meta_params, key), self.step.mesh
        theta, run_key = place(mesh and automatic(mesh), (meta.meta_params, meta.key))
        with untyped(mesh):
            memory = self._begin(theta, jax.tree.map(shape_of, tasks), run_key)
            if self.on_host:
                return WarmState(meta, jax.tree.map(np.array, memory))
        return WarmState(meta, place(mesh, memory, P(TASKS)))

    def _begin(self, theta: MetaParams, tasks: Batch, key: Array) -> Memory:
        """The memory of all members before any step."""
        shapes = jax.eval_shape(self._first_memory, theta, tasks, key)
        start, layout = self._at_start(theta, self.size), {}
        if self.step.mesh is not None and not self.on_host:
            layout = _layout_of(start, automatic(self.step.mesh))
            start = jax.tree.map(lambda leaf: put(leaf, layout[leaf.shape]), start)

        def blank(leaf: jax.ShapeDtypeStruct) -> Array:
            shape = (self.size, *leaf.shape[1:])
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # a solver's own, not yet used
                return jnp.broadcast_to(key, shape)
            return jnp.zeros(shape, leaf.dtype, device=layout.get(shape))

        memory: Memory = jax.tree.map(blank, shapes)
        run_key = jax.random.fold_in(jax.random.fold_in(key, DRAWS), LIVES)
        members = jnp.arange(self.size)
        keys = jax.vmap(lambda number: jax.random.fold_in(run_key, number))(members)
        return memory._replace(params=start, key=jax.random.key_data(keys))

    def _first_memory(self, meta_params: MetaParams, tasks: Batch, key: Array) -> Memory | None:
        """What the estimator keeps of one task, for its shapes."""
        problem, inner = self.step.problem, self.step.inner
        one = jax.tree.map(lambda leaf: leaf[:1], tasks)
        wide_problem, start, _ = widened(problem, problem.init(meta_params))
        context = problem.embed(meta_params, jax.tree.map(lambda leaf: leaf[0], tasks))
        begun = inner.start(wide_problem, start, context)
        words, unknown = jax.random.key_data(key), begun.gradient_norm
        first = Memory(start, begun.solver, begun.steps, unknown, words, None)
        chunk = Chunk.of(one)._replace(memory=jax.tree.map(lambda leaf: leaf[None], first))
        return self.step.estimator(problem, inner, meta_params, chunk).memory

    def _at_start(self, meta_params: MetaParams, count: int) -> PyTree:
        """φ₀ of so many members."""
        problem = self.step.problem
        _, start, _ = widened(problem, problem.init(meta_params))
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), start)

    def __call__(
        self, state: WarmState, tasks: Batch, numbers: Int[Array, " tasks"] | None = None
    ) -> tuple[WarmState, Metrics]:
        """One compiled meta-step; `state` is donated (with `on_host`, its arrays are written to).

        Args:
            state: from `init` or the previous call.
            tasks: some or all tasks of the set, a pytree with a leading axis of tasks.
            numbers: [tasks] which ones they are, each at most once, from 0 to size − 1; None: all
                of them, in order.

        Returns:
            The next state, and the metrics of this step.

        Raises:
            ValueError: the state is of another number of members, there are not as many numbers as
                tasks, or (outside compiled code) one is out of range or twice there.
        """
        self._check(state, tasks, numbers)
        if not self.on_host:
            updated: tuple[WarmState, Metrics] = self.compiled(state, tasks, numbers)
            return updated
        rows = np.arange(self.size) if numbers is None else np.asarray(numbers)
        memory = jax.tree.map(lambda leaf: leaf[rows], state.memory)
        tasks, memory = place(self.step.mesh, (tasks, memory), P(TASKS))
        meta, metrics, found = self._compiled_on_host(state.meta, tasks, memory)

        def write(leaf: np.ndarray, new: Array) -> None:
            leaf[rows] = np.asarray(new)

        jax.tree.map(write, state.memory, found)
        return WarmState(meta, state.memory), metrics

    @cached_property
    def _compiled_on_host(self) -> Any:
        def updated(meta: MetaState, tasks: Batch, memory: Memory) -> Any:
            out = (specs(meta), METRICS, specs(memory))
            return without_types(self.step.mesh, self._update_rows, out)(meta, tasks, memory)

        return jax.jit(updated, donate_argnums=0)

    @cached_property
    def compiled(self) -> Any:
        """`update` under `jax.jit` with the state donated; `.lower(...)` shows what it costs."""
        return jax.jit(self.update, donate_argnums=0)

    def update(
        self, state: WarmState, tasks: Batch, numbers: Int[Array, " tasks"] | None = None
    ) -> tuple[WarmState, Metrics]:
        """`__call__` as a pure function that is not yet compiled; the memory is on the devices.

        The body of a `jax.lax.scan` over many meta-steps in one compiled program.
        """
        self._check(state, tasks, numbers)
        out = (specs(state), METRICS)
        found: tuple[WarmState, Metrics] = without_types(self.step.mesh, self._update, out)(
            state, tasks, numbers
        )
        return found

    def _update(
        self, state: WarmState, tasks: Batch, numbers: Int[Array, " tasks"] | None
    ) -> tuple[WarmState, Metrics]:
        if numbers is None:
            meta, metrics, memory = self._update_rows(state.meta, tasks, state.memory)
        else:
            rows = jax.tree.map(lambda leaf: leaf[numbers], state.memory)
            meta, metrics, found = self._update_rows(state.meta, tasks, rows)
            write = lambda leaf, new: leaf.at[numbers].set(new, unique_indices=True)  # noqa: E731
            memory = jax.tree.map(write, state.memory, found)
        if self.step.mesh is not None:
            memory = jax.tree.map(
                partial(_as_it_came, automatic(self.step.mesh)), memory, state.memory
            )
        return WarmState(meta, memory), metrics

    def _update_rows(
        self, meta: MetaState, tasks: Batch, memory: Memory
    ) -> tuple[MetaState, Metrics, Memory]:
        """One meta-step, and what is then to be kept of its members."""
        following, metrics, found = self.step.update_remembering(meta, tasks, memory)
        each = metrics.tasks
        assert each is not None  # for the type checker: None in means over meta-steps
        if found is None or not _of_one_kind(found, memory):
            raise ValueError(
                "state: found a memory of another kind than this step's estimator keeps (another "
                "estimator's, or another inner solver's). Take a state of this WarmStart's init."
            )
        finite = jax.vmap(trees.all_finite)((each.loss, found.params, found.solution))
        lost = each.finite_inputs & ~finite
        metrics = with_reset(metrics, jnp.sum(lost, dtype=jnp.int32))
        # A task whose own data are not finite keeps the memory that it had.
        table = _written(memory.table, found.table, each.finite_inputs)
        rest = (kept._replace(table=None) for kept in (found, memory))
        found = jax.vmap(trees.where)(each.finite_inputs, *rest)._replace(table=table)
        due = lost | self._due(meta.key, found, each)
        # Few meta-steps end a life: all others neither draw keys nor go through what is kept.
        found = jax.lax.cond(
            jnp.any(due), self._begun_anew, lambda due, memory, meta: memory, due, found, following
        )
        return following, metrics, found

    def _due(self, key: Array, memory: Memory, tasks: TaskMetrics) -> Bool[Array, " tasks"]:
        """Which members the condition lets begin anew."""
        if self.reset is None:
            return jnp.zeros(tasks.usable.shape, bool)
        keys = as_keys(memory.key, key)
        return jax.vmap(self.reset)(keys, memory.steps, tasks.report)

    def _begun_anew(self, due: Bool[Array, " tasks"], memory: Memory, meta: MetaState) -> Memory:
        """The memory with no step made by those that are due, and a new key for their next life."""
        zeros = lambda leaf: jnp.zeros_like(leaf) if trees.is_inexact(leaf) else leaf  # noqa: E731
        blank = jax.tree.map(zeros, memory)
        keys = as_keys(memory.key, meta.key)
        keys = jax.random.key_data(jax.vmap(lambda key: jax.random.fold_in(key, LIVES))(keys))
        start = self._at_start(meta.meta_params, due.size)
        blank = blank._replace(params=start, steps=jnp.zeros_like(memory.steps), key=keys)
        anew: Memory = jax.vmap(trees.where)(due, blank, memory)
        return anew

    def memory_bytes(self, state: WarmState) -> int:
        """What the warm starts cost: bytes of what is kept of all members."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state.memory))

    def _check(self, state: WarmState, tasks: Batch, numbers: PyTree) -> None:
        is_state = isinstance(state, WarmState)
        checks.require("state", type(state).__name__, is_state, "a WarmState, from init")
        require_state(state.meta)
        members = state.memory.steps.shape[0]
        if members != self.size:
            raise ValueError(
                f"state: found the memory of {members} members, expected {self.size}. Take a state "
                f"of this population (init), or make WarmStart(..., size={members})."
            )
        count = trees.leading_size(tasks, "tasks")
        if numbers is None:
            if count != self.size:
                raise ValueError(
                    f"numbers: found None for {count} of {self.size} tasks, expected which ones "
                    "they are, [tasks] numbers."
                )
            return
        if np.shape(numbers) != (count,):
            raise ValueError(
                f"numbers: expected one for each of the {count} tasks, found shape "
                f"{np.shape(numbers)}."
            )
        if isinstance(numbers, jax.core.Tracer):
            return
        listed = np.asarray(numbers)
        if len(np.unique(listed)) != count or listed.min() < 0 or listed.max() >= self.size:
            raise ValueError(
                f"numbers: expected different numbers from 0 to {self.size - 1}, found "
                f"{listed.tolist()}."
            )


def _layout_of(start: PyTree, mesh: Mesh) -> dict[Any, NamedSharding]:
    """By shape: members over the tasks' axis, and each as φ is over the other axes of the mesh.

    What has the shape of a leaf of φ, such as a solver's moments or v̂, is laid out as that is.
    """
    layout = {}
    for leaf in jax.tree.leaves(start):
        known = isinstance(leaf.sharding, NamedSharding)
        inside = leaf.sharding.spec[1:] if known else ()
        layout[leaf.shape] = NamedSharding(mesh, P(TASKS, *inside))
    return layout


def _as_it_came(mesh: Mesh, new: Array, old: Array) -> Array:
    """Members over the tasks' axis, and each over whatever else it was."""
    new = _sharded_alike(new, old)
    rest = [P.UNCONSTRAINED] * (new.ndim - 1) if len(mesh.axis_names) > 1 else []
    kept: Array = jax.lax.with_sharding_constraint(new, NamedSharding(mesh, P(TASKS, *rest)))
    return kept


def _sharded_alike(new: Array, old: Array) -> Array:
    """Tell the compiler that both are sharded alike; jax 0.11 has no word for it and finds out."""
    try:
        from jax.experimental.shard_alike import shard_alike
    except ImportError:
        return new
    found: Array = shard_alike(new, old)[0]
    return found


def _of_one_kind(found: Memory, memory: Memory) -> bool:
    """Whether an estimator gave back what can take the memory's place."""
    if (found.table is None) != (memory.table is None):
        return False
    alike = found._replace(table=found.table and found.table.values)
    return len({jax.tree.structure(kept) for kept in (alike, memory)}) == 1


def _written(table: PyTree, row: Row | None, finite: Bool[Array, " members"]) -> PyTree:
    """The members' tables, [members, rows, ...], each with its row where the data are finite."""
    if row is None:
        return None

    def one(table: PyTree, row: Row, finite: Array) -> PyTree:
        # The write depends on what was read. XLA (jax 0.10.2) would else copy the whole table, so
        # that it may read after the write, and a write that is dropped out of bounds reads again.
        kept = trees.where(finite & trees.all_finite(row.values), row.values, row.before)
        write = lambda leaf, x: leaf.at[row.number].set(x, mode="promise_in_bounds")  # noqa: E731
        return jax.tree.map(write, table, kept)

    return over_tasks(one, table, row, finite)

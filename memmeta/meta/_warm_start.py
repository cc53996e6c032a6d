"""Warm starts for a finite set of tasks: φ_i and v_i kept from one meta-step to the next.

With them the deterministic algorithm converges to the exact solution at a fixed number of inner and
linear steps; from a cold start a bias remains, which depends on those numbers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key, PyTree

from memmeta import _checks
from memmeta import _trees as trees
from memmeta.hypergradient._seam import Memory
from memmeta.inner._loop import widened
from memmeta.meta._mesh import TASKS, place, shards
from memmeta.meta._metrics import Metrics
from memmeta.meta._step import MetaState, MetaStep
from memmeta.problem import Batch, MetaParams


class WarmState(NamedTuple):
    """Everything a warm-started run carries from one meta-step to the next.

    Attributes:
        meta: of the meta-step underneath.
        memory: φ_i and v_i of all tasks, every leaf [size, ...]; NumPy arrays where `on_host`.
    """

    meta: MetaState
    memory: Memory


@dataclass(frozen=True)
class WarmStart:
    r"""A meta-step over a finite set of tasks that starts each from its last φ_i and v_i.

    $$\phi_i^{t+1} = \text{inner}(\phi_i^t), \qquad v_i^{t+1} = \text{solver}(v_i^t)$$

    Costs 2 · size · dim φ numbers (`memory_bytes`), spread over the devices of the meta-step's mesh
    or in the host's memory. Wraps a meta-step and is no option of it, because its state is larger
    and its call takes the tasks' numbers. The meta-step inside serves fresh tasks, for evaluation
    or an infinite set, from a cold start: `step.step(state.meta, tasks)`.

    Attributes:
        step: made by `make_meta_step`, with an estimator that remembers, such as `implicit`.
        size: tasks in the set; with a mesh a multiple of its devices, unless `on_host`.
        on_host: keep the memory outside the devices; each call moves the rows of its tasks.

    Raises:
        ValueError: `size` is not positive, or the devices cannot share it out evenly.

    Source: the warm starts of AmIGO (Arbel and Mairal, ICLR 2022).

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
        >>> step = WarmStart(cold, size=2)
        >>> state, tasks = step.init(jnp.zeros(2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> for _ in range(200):
        ...     state, metrics = step(state, tasks, jnp.arange(2))
        >>> state.meta.meta_params.round(2).tolist()
        [2.0, 3.0]
    """

    step: MetaStep
    size: int
    on_host: bool = False

    def __post_init__(self) -> None:
        _checks.count("size", self.size)
        count = shards(self.step.mesh)
        if not self.on_host and self.size % count:
            raise ValueError(
                f"size: found {self.size}, expected a multiple of the {count} devices the memory "
                f"is spread over. Round it up to {-(-self.size // count) * count} (a row that no "
                "task has costs its memory and nothing else), or keep it on_host."
            )

    def init(self, meta_params: MetaParams, key: Key[Array, ""] | None = None) -> WarmState:
        """The state of a new run: every φ_i at `problem.init`, every v_i zero.

        Args:
            meta_params: θ at the start.
            key: PRNG key of the run.

        Returns:
            The state: `meta`, that of the meta-step inside, and `memory`, whose `params` and
            `solution` are φ_i and v_i of all tasks, every leaf [size, ...].
        """
        library: Any = np if self.on_host else jnp
        problem = self.step.problem
        _, start, _ = widened(problem, problem.init(meta_params))

        def rows(leaf: Array) -> Any:
            return library.broadcast_to(library.asarray(leaf), (self.size, *leaf.shape)).copy()

        params = jax.tree.map(lambda leaf: rows(jnp.asarray(leaf)), start)
        zeros = jax.tree.map(library.zeros_like, params)
        memory = Memory(params, zeros)
        if not self.on_host:
            memory = place(self.step.mesh, memory, P(TASKS))
        return WarmState(self.step.init(meta_params, key), memory)

    def __call__(
        self, state: WarmState, tasks: Batch, numbers: Int[Array, " tasks"]
    ) -> tuple[WarmState, Metrics]:
        """One compiled meta-step; `state` is donated (with `on_host`, its arrays are written to).

        Args:
            state: from `init` or the previous call.
            tasks: some or all tasks of the set, a pytree with a leading axis of tasks.
            numbers: [tasks] which ones they are, each at most once, from 0 to size − 1.

        Returns:
            The next state, and the metrics of this step.

        Raises:
            ValueError: there are not as many numbers as tasks, or (outside compiled code) one is
                out of range or twice there.
        """
        self._check(tasks, numbers)
        if not self.on_host:
            updated: tuple[WarmState, Metrics] = self.compiled(state, tasks, numbers)
            return updated
        rows = np.asarray(numbers)
        memory = jax.tree.map(lambda leaf: leaf[rows], state.memory)
        tasks, memory = place(self.step.mesh, (tasks, memory), P(TASKS))
        meta, metrics, found = self._compiled_on_host(state.meta, tasks, memory)
        assert metrics.tasks is not None  # for the type checker: None in means over meta-steps
        usable = np.asarray(metrics.tasks.usable)

        def write(leaf: np.ndarray, new: Array) -> None:
            leaf[rows[usable]] = np.asarray(new)[usable]

        jax.tree.map(write, state.memory, found)
        return WarmState(meta, state.memory), metrics

    @cached_property
    def _compiled_on_host(self) -> Any:
        return jax.jit(self.step.update_remembering, donate_argnums=0)

    @cached_property
    def compiled(self) -> Any:
        """`update` under `jax.jit` with the state donated; `.lower(...)` shows what it costs."""
        return jax.jit(self.update, donate_argnums=0)

    def update(
        self, state: WarmState, tasks: Batch, numbers: Int[Array, " tasks"]
    ) -> tuple[WarmState, Metrics]:
        """`__call__` as a pure function that is not yet compiled; the memory is on the devices."""
        memory = jax.tree.map(lambda leaf: leaf[numbers], state.memory)
        meta, metrics, found = self.step.update_remembering(state.meta, tasks, memory)
        assert metrics.tasks is not None
        usable = metrics.tasks.usable

        def written(leaf: Array, old: Array, new: Array) -> Array:
            # A task that was not finite keeps the memory that it had.
            kept = jnp.where(usable.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)
            return leaf.at[numbers].set(kept, unique_indices=True)

        return WarmState(meta, jax.tree.map(written, state.memory, memory, found)), metrics

    def memory_bytes(self, state: WarmState) -> int:
        """What the warm starts cost: bytes of φ_i and v_i of all tasks."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.memory))

    def _check(self, tasks: Batch, numbers: PyTree) -> None:
        count = trees.leading_size(tasks, "tasks")
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

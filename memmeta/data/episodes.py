"""The episode sampler: N-way K-shot tasks drawn on the device by PRNG key, inside compiled code."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, PRNGKeyArray

from memmeta.data.dataset import DataError, Dataset
from memmeta.data.numbered import sample_numbered
from memmeta.problem import Task


@dataclass(frozen=True)
class Episodes:
    """What an episode is: `ways` classes, each with `shots` support and `queries` query examples.

    A group is drawn with probability proportional to its number of classes, among the groups that
    have enough of them; then classes of that group and examples of each class, all without
    replacement. The order of the classes is random, so the labels 0 to `ways - 1` carry no
    meaning from one episode to the next.

    Args:
        ways: classes in an episode (N).
        shots: support examples of each class (K).
        queries: query examples of each class (Q).
        within_group: draw all classes from one group, such as one script; otherwise from the
            whole split. None: as is usual for the data (`Dataset.within_group`).
        cross_family: draw the support from one family of examples and the query from another,
            such as two font families; which is which is drawn for each episode.

    Raises:
        ValueError: `ways`, `shots` or `queries` is not a positive integer.

    Example:
        >>> import jax
        >>> import memmeta.data
        >>> dataset = memmeta.data.load("glyphs", "test")
        >>> episodes = Episodes(ways=5, shots=1, queries=15)
        >>> episodes.check(dataset)
        >>> sample = jax.jit(episodes.sample_batch, static_argnums=2)
        >>> tasks = sample(dataset, jax.random.key(0), 4)
        >>> tasks.support_inputs.shape, tasks.query_inputs.shape
        ((4, 5, 28, 28, 1), (4, 75, 28, 28, 1))
        >>> tasks.support_targets[0].tolist()
        [0, 1, 2, 3, 4]
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15
    within_group: bool | None = None
    cross_family: bool = False

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: it must be a positive integer")

    def sample(self, dataset: Dataset, key: PRNGKeyArray) -> Task:
        """Draw one task; pure, and fit for `jax.jit` and `jax.vmap`.

        Whether the data allow the episodes can be seen outside compiled code only: call `check`
        once before. (Called outside compiled code, this function does so itself.)

        Args:
            dataset: the classes to draw from, passed as an argument and never closed over.
            key: the PRNG key; the same key and data give the same task.

        Returns:
            The task, class by class: inputs `[ways * shots, *shape]` and
            `[ways * queries, *shape]` of the data's dtype, targets int32.

        Raises:
            DataError: as `check`, when the data are at hand.
        """
        if not isinstance(dataset.count, jax.core.Tracer):
            self.check(dataset)
        support, query = self._candidates(dataset)
        usable, sizes = self._usable(dataset, support, query)
        startable = usable & (sizes >= self.ways)
        group = self._group(dataset)

        first_key, pair_key, class_key, support_key, query_key = jax.random.split(key, 5)
        first = _draw(first_key, startable.any(axis=0), 1)[0]  # any class of the drawn group
        pair = _draw(pair_key, startable[:, first], 1)[0]
        classes = _draw(class_key, usable[pair] & (group == group[first]), self.ways)

        rows = classes[:, None]
        support_examples = _draw(support_key, support[pair, classes], self.shots)
        taken = jax.nn.one_hot(support_examples, support.shape[-1], dtype=bool).any(axis=1)
        query_examples = _draw(query_key, query[pair, classes] & ~taken, self.queries)

        inputs = jnp.asarray(dataset.inputs)
        shape = inputs.shape[2:]
        labels = jnp.arange(self.ways, dtype=jnp.int32)
        return Task(
            support_inputs=inputs[rows, support_examples].reshape(-1, *shape),
            support_targets=jnp.repeat(labels, self.shots),
            query_inputs=inputs[rows, query_examples].reshape(-1, *shape),
            query_targets=jnp.repeat(labels, self.queries),
        )

    def sample_batch(
        self, dataset: Dataset, key: PRNGKeyArray, tasks: int, first: int | Int[Array, ""] = 0
    ) -> Task:
        """Draw tasks number `first` to `first + tasks - 1` of the endless list that `key` names.

        Task i is `sample(dataset, jax.random.fold_in(key, i))`, so it does not matter in what
        chunks, in what order or on how many devices a list of tasks is drawn.

        Args:
            dataset: the classes to draw from.
            key: the PRNG key of the list.
            tasks: how many tasks to draw.
            first: the number of the first one; may be traced.

        Returns:
            The tasks, every array with a leading axis of length `tasks`.

        Raises:
            DataError: as `check`, when the data are at hand.
        """
        return sample_numbered(lambda k: self.sample(dataset, k), key, tasks, first)

    def check(self, dataset: Dataset) -> None:
        """Check, outside compiled code, that such episodes can be drawn from the data.

        Args:
            dataset: the classes to draw from.

        Raises:
            DataError: they cannot; the message names the largest figure that the data allow.
        """
        where = f"{dataset.name}/{dataset.split}"
        if self.cross_family and len(dataset.family_names) < 2:
            raise DataError(f"cross_family=True, but {where} has only one family of examples")
        support, query, sizes = map(np.asarray, _count(self, dataset))
        if not sizes.any():
            raise DataError(self._too_few_examples(where, support, query))
        most = int(sizes.max())
        if self.ways > most:
            largest = int(np.asarray(dataset.group)[sizes.max(axis=0).argmax()])
            name = dataset.group_names[largest]
            owner = f"the largest group, {name}," if self._by_group(dataset) else "it"
            raise DataError(
                f"ways={self.ways} is too many for {where}: {owner} has {most} classes with enough "
                f"examples for shots={self.shots} and queries={self.queries}; use ways <= {most}"
            )

    def _too_few_examples(self, where: str, support: np.ndarray, query: np.ndarray) -> str:
        """Why no class has enough examples, and the most that would do."""
        asked = f"shots={self.shots} and queries={self.queries} are too many for {where}"
        if not self.cross_family:
            most = int(support.max())
            return f"{asked}: its largest class has {most} examples; use shots + queries <= {most}"
        pairs = zip(support.ravel().tolist(), query.ravel().tolist(), strict=True)
        allowed = [(s, q) for s, q in pairs if s and q]
        if not allowed:
            return f"cross_family=True, but no class of {where} has examples of two families"
        best = max(allowed, key=lambda sides: (min(sides), sum(sides)))
        return (
            f"{asked} with cross_family=True: a class has {best[0]} examples of one family and "
            f"{best[1]} of another; use shots <= {best[0]} and queries <= {best[1]}"
        )

    def _candidates(
        self, dataset: Dataset
    ) -> tuple[Bool[Array, "pairs classes examples"], Bool[Array, "pairs classes examples"]]:
        """Which examples may be support and which query, for each (support, query) family pair.

        Without `cross_family` there is one pair, and every example may be either.
        """
        numbers = jnp.arange(dataset.inputs.shape[1], dtype=jnp.int32)
        present = numbers < jnp.asarray(dataset.count)[:, None]
        if not self.cross_family:
            return present[None], present[None]
        families = range(len(dataset.family_names))
        of_family = [present & (jnp.asarray(dataset.family) == f) for f in families]
        pairs = [(of_family[s], of_family[q]) for s in families for q in families if s != q]
        support, query = zip(*pairs, strict=True)
        return jnp.stack(support), jnp.stack(query)

    def _usable(
        self,
        dataset: Dataset,
        support: Bool[Array, "pairs classes examples"],
        query: Bool[Array, "pairs classes examples"],
    ) -> tuple[Bool[Array, "pairs classes"], Int32[Array, "pairs classes"]]:
        """Which classes have enough examples for both sides, and how many such its group has."""
        usable = (
            (support.sum(axis=-1) >= self.shots)
            & (query.sum(axis=-1) >= self.queries)
            & ((support | query).sum(axis=-1) >= self.shots + self.queries)
        )
        group = self._group(dataset)
        counts = usable.T.astype(jnp.int32)
        totals = jax.ops.segment_sum(counts, group, num_segments=len(group))
        return usable, totals[group].T

    def _group(self, dataset: Dataset) -> Int32[Array, " classes"]:
        group = jnp.asarray(dataset.group)
        return group if self._by_group(dataset) else jnp.zeros_like(group)

    def _by_group(self, dataset: Dataset) -> bool:
        return dataset.within_group if self.within_group is None else self.within_group


@partial(jax.jit, static_argnums=0)
def _count(episodes: Episodes, dataset: Dataset) -> tuple[Array, Array, Array]:
    """Support and query candidates, and the usable classes of the group, per pair and class."""
    support, query = episodes._candidates(dataset)
    usable, sizes = episodes._usable(dataset, support, query)
    return support.sum(axis=-1), query.sum(axis=-1), jnp.where(usable, sizes, 0)


def _draw(
    key: PRNGKeyArray, allowed: Bool[Array, "*rows choices"], number: int
) -> Int32[Array, "..."]:
    """Draw `number` of the allowed choices in each row, uniformly and without replacement.

    The largest of independent scores are such a draw, in random order. float32 also under x64, so
    that a key means the same episode in both.
    """
    scores = jax.random.uniform(key, allowed.shape, jnp.float32)
    return jax.lax.top_k(jnp.where(allowed, scores, -1.0), number)[1]

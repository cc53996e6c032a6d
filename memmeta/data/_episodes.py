"""The episode sampler: N-way K-shot tasks drawn on the device by PRNG key, inside compiled code."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, PRNGKeyArray

from memmeta.data._dataset import DataError, Dataset, say_once
from memmeta.data._numbered import sample_numbered
from memmeta.problem import Task

PADDING = -1  # the target of what is no example
NAMED = 10  # classes that a message names
KEYS = 8  # an episode's independent draws


@dataclass(frozen=True)
class Episodes:
    """What an episode is: `ways` classes, each with `shots` support and `queries` query examples.

    A group is drawn with probability proportional to its number of classes, among the groups that
    have enough of them; then classes of that group and examples of each class, all without
    replacement. The order of the classes is random, so the labels 0 to `ways - 1` carry no
    meaning from one episode to the next.

    Where `ways` or `shots` is a range, each episode draws its own, uniformly. All episodes have the
    shapes of the largest: what an episode does not use is padding, with inputs of 0 and targets
    of -1.

    Args:
        ways: classes in an episode (N), or the least and the most of them.
        shots: support examples of each class (K), or the fewest and the most.
        queries: query examples of each class (Q).
        within_group: draw all classes from one group, such as one script; otherwise from the
            whole split. None: as is usual for the data (`Dataset.within_group`).
        cross_family: draw the support from one family of examples and the query from another,
            such as two font families; which is which is drawn for each episode.
        augmentation: (key, images) -> images, for the support and for the query;
            `memmeta.data.Augmentation` is one. It must be hashable.
        uneven: take the classes that have too few examples too, instead of leaving them out: the
            support gets `shots` of them as long as one is left for the query, the query what is
            left; what a class lacks is padding.

    Raises:
        ValueError: `ways`, `shots` or `queries` is not a positive integer or a range of them.

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
        >>> sample = jax.jit(Episodes(ways=(2, 3), shots=(1, 2)).sample)
        >>> sample(dataset, jax.random.key(1)).support_targets.tolist()
        [0, 0, 1, 1, -1, -1]
    """

    ways: int | tuple[int, int] = 5
    shots: int | tuple[int, int] = 1
    queries: int = 15
    within_group: bool | None = None
    cross_family: bool = False
    augmentation: Callable[[PRNGKeyArray, Array], Array] | None = None
    uneven: bool = False

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries"):
            value = getattr(self, name)
            least, most = value if isinstance(value, tuple) and name != "queries" else (value,) * 2
            if not (isinstance(least, int) and isinstance(most, int) and 1 <= least <= most):
                range_too = "" if name == "queries" else " or a range (least, most) of them"
                raise ValueError(f"{name}={value!r}: it must be a positive integer{range_too}")

    @property
    def most_ways(self) -> int:
        """The largest number of classes in an episode: the outputs that a network needs."""
        return _ends(self.ways)[1]

    @property
    def most_shots(self) -> int:
        """The largest number of support examples of a class."""
        return _ends(self.shots)[1]

    def sample(self, dataset: Dataset, key: PRNGKeyArray) -> Task:
        """Draw one task; pure, and fit for `jax.jit` and `jax.vmap`.

        Whether the data allow the episodes can be seen outside compiled code only: call `check`
        once before. (Called outside compiled code, this function does so itself.) Unchecked, what
        the data do not have is padding.

        Args:
            dataset: the classes to draw from, passed as an argument and never closed over.
            key: the PRNG key; the same key and data give the same task.

        Returns:
            The task, class by class: inputs `[ways * shots, *shape]` and
            `[ways * queries, *shape]` of the data's dtype (or the augmentation's), targets int32,
            -1 for padding.

        Raises:
            DataError: as `check`, when the data are at hand.
        """
        return self.finish(self.draw(dataset, key), key)

    def draw(self, dataset: Dataset, key: PRNGKeyArray) -> Task:
        """The first half of `sample`: the examples as they are stored, padding not yet blanked.

        Arguments and errors as for `sample`.
        """
        if not isinstance(dataset.count, jax.core.Tracer):
            self._usable_classes(dataset)
        self._check_sizes(*dataset.inputs.shape[:2])
        support, query = self._candidates(dataset)
        usable, sizes = self._usable(dataset, support, query)
        startable = usable & (sizes >= self.most_ways)
        group = self._group(dataset)

        keys = jax.random.split(key, KEYS)
        first = _draw(keys[0], startable.any(axis=0), 1)[0][0]  # any class of the drawn group
        pair = _draw(keys[1], startable[:, first], 1)[0][0] if len(startable) > 1 else 0
        classes, found = _draw(keys[2], usable[pair] & (group == group[first]), self.most_ways)

        rows = classes[:, None]
        support_examples, in_support = _draw(keys[3], support[pair, classes], self.most_shots)
        if self.uneven:  # one example at least is left for the query
            present = (support | query)[pair, classes].sum(axis=-1)
            in_support &= jnp.arange(self.most_shots) < present[:, None] - 1
        taken = jax.nn.one_hot(support_examples, support.shape[-1], dtype=bool)
        taken = (taken & in_support[..., None]).any(axis=1)
        query_examples, in_query = _draw(keys[4], query[pair, classes] & ~taken, self.queries)

        inputs = jnp.asarray(dataset.inputs)
        shape = inputs.shape[2:]
        labels = jnp.arange(self.most_ways, dtype=jnp.int32)
        labels = jnp.where(found & (labels < _between(keys[5], self.ways)), labels, PADDING)
        shots = jnp.arange(self.most_shots, dtype=jnp.int32) < _between(keys[6], self.shots)
        return Task(
            support_inputs=inputs[rows, support_examples].reshape(-1, *shape),
            support_targets=jnp.where(shots & in_support, labels[:, None], PADDING).ravel(),
            query_inputs=inputs[rows, query_examples].reshape(-1, *shape),
            query_targets=jnp.where(in_query, labels[:, None], PADDING).ravel(),
        )

    def finish(self, task: Task, key: PRNGKeyArray) -> Task:
        """The second half of `sample`: augmentation, and padding set to zero.

        Args:
            task: from `draw`.
            key: the same key.

        Returns:
            The task.
        """
        keys = jax.random.split(jax.random.split(key, KEYS)[KEYS - 1])
        return task._replace(
            support_inputs=self._finished(keys[0], task.support_inputs, task.support_targets),
            query_inputs=self._finished(keys[1], task.query_inputs, task.query_targets),
        )

    def _finished(self, key: PRNGKeyArray, inputs: Array, targets: Array) -> Array:
        if self.augmentation is not None:
            inputs = self.augmentation(key, inputs)
        used = (targets != PADDING).reshape(-1, *(1,) * (inputs.ndim - 1))
        return jnp.where(used, inputs, jnp.zeros_like(inputs))

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

        Classes with too few examples, which the episodes leave out, are logged by name.

        Args:
            dataset: the classes to draw from.

        Raises:
            DataError: they cannot; the message names the largest figure that the data allow.
        """
        usable = self._usable_classes(dataset)
        count = np.asarray(dataset.count)
        left_out = np.flatnonzero(~usable & (count > 0))
        if not len(left_out):
            return
        names = [f"{dataset.class_names[row]} ({count[row]})" for row in left_out[:NAMED]]
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        say_once(
            f"{dataset.name}/{dataset.split}: {len(left_out)} of {(count > 0).sum()} classes have "
            f"too few examples for shots={self.shots} and queries={self.queries} and are left out: "
            f"{', '.join(names)}{more}; uneven takes them with those they have"
        )

    def _usable_classes(self, dataset: Dataset) -> Bool[np.ndarray, " classes"]:
        """The classes with enough examples; raises where they are too few, as `check` does."""
        where = f"{dataset.name}/{dataset.split}"
        if self.cross_family and len(dataset.family_names) < 2:
            raise DataError(f"cross_family=True, but {where} has only one family of examples")
        with jax.ensure_compile_time_eval():  # also where only the key is traced
            support, query, sizes = map(np.asarray, _count(self, dataset))
        if not sizes.any():
            raise DataError(self._too_few_examples(where, support, query))
        most = int(sizes.max())
        if self.most_ways > most:
            largest = int(np.asarray(dataset.group)[sizes.max(axis=0).argmax()])
            name = dataset.group_names[largest]
            owner = f"the largest group, {name}," if self._by_group(dataset) else "it"
            raise DataError(
                f"ways={self.ways} is too many for {where}: {owner} has {most} classes with enough "
                f"examples for shots={self.shots} and queries={self.queries}; use ways <= {most}"
            )
        return np.asarray((sizes > 0).any(axis=0))

    def _check_sizes(self, classes: int, examples: int) -> None:
        """What the shape of the data alone forbids."""
        limits = {"ways": classes, "shots": examples, "queries": examples}
        if self.uneven:
            limits = {"ways": classes}
        for name, most in limits.items():
            if _ends(getattr(self, name))[1] > most:
                found = getattr(self, name)
                raise DataError(f"{name}={found} is too many for these data; use {name} <= {most}")

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
        shots, queries = (1, 1) if self.uneven else (self.most_shots, self.queries)
        usable = (
            (support.sum(axis=-1) >= shots)
            & (query.sum(axis=-1) >= queries)
            & ((support | query).sum(axis=-1) >= shots + queries)
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


def _ends(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _between(key: PRNGKeyArray, value: int | tuple[int, int]) -> Int32[Array, ""]:
    least, most = _ends(value)
    if least == most:
        return jnp.asarray(most, jnp.int32)
    drawn: Array = jax.random.randint(key, (), least, most + 1, jnp.int32)
    return drawn


def _draw(
    key: PRNGKeyArray, allowed: Bool[Array, "*rows choices"], number: int
) -> tuple[Int32[Array, "..."], Bool[Array, "..."]]:
    """Draw `number` of the allowed choices in each row, uniformly and without replacement.

    Returns the choices and which of them are allowed: not all where there are fewer than `number`.

    The largest of independent scores are such a draw, in random order. float32 also under x64, so
    that a key means the same episode in both.
    """
    scores = jax.random.uniform(key, allowed.shape, jnp.float32)
    there = min(number, allowed.shape[-1])
    scores, choices = jax.lax.top_k(jnp.where(allowed, scores, -1.0), there)
    lacking = [(0, 0)] * (choices.ndim - 1) + [(0, number - there)]
    return jnp.pad(choices, lacking), jnp.pad(scores >= 0, lacking)

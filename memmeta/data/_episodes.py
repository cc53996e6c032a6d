"""The episode sampler: N-way K-shot tasks drawn on the device, inside compiled code."""

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

PADDING = -1  # the target of padding
NAMED = 10  # the most classes that a message lists
KEYS = 8  # keys an episode is drawn with


@dataclass(frozen=True)
class Episodes:
    """A sampler of episodes: `ways` classes with `shots` support and `queries` query examples each.

    First a group is drawn among those with enough usable classes, with probability proportional to
    the number of these classes; then classes of that group; then examples of each class; all
    without replacement. A class is usable if it has enough examples. The order of the classes is
    random, so that the labels 0 to `ways - 1` mean different classes in every episode.

    If `ways` or `shots` is a range, each episode draws its own number uniformly. All episodes have
    the array shapes of the largest one; unused entries are padding, with inputs 0 and targets -1.

    Args:
        ways: classes in an episode (N), or a pair of the fewest and the most.
        shots: support examples of each class (K), or a pair of the fewest and the most.
        queries: query examples of each class (Q).
        within_group: draw all classes from one group, such as one script, instead of the whole
            split. None: use the data set's default, `Dataset.within_group`.
        cross_family: draw the support examples from one family and the query examples from another,
            such as two font families; the pair of families is drawn for each episode.
        augmentation: function from (key, images) to images, applied to the support and to the
            query; for example `memmeta.data.Augmentation`. It must be hashable.
        uneven: also use classes with too few examples, instead of leaving them out. The support
            gets up to `shots` examples but leaves at least one for the query, the query gets up to
            `queries` of the rest, and missing examples are padding.

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
        """The largest number of classes in an episode: the number of outputs a network needs."""
        return _ends(self.ways)[1]

    @property
    def most_shots(self) -> int:
        """The largest number of support examples of a class."""
        return _ends(self.shots)[1]

    def sample(self, dataset: Dataset, key: PRNGKeyArray) -> Task:
        """Draw one task; a pure function that works under `jax.jit` and `jax.vmap`.

        Compiled code cannot check that the data set has enough classes and examples, so call
        `check` before. (Outside compiled code this method checks it itself.) Without the check,
        missing examples are padding.

        Args:
            dataset: the classes to draw from; pass it to a compiled function as an argument instead
                of closing over it.
            key: the PRNG key; the same key and data give the same task.

        Returns:
            The task, sorted by class: inputs `[ways * shots, *shape]` and
            `[ways * queries, *shape]` of the data's dtype (or the augmentation's), targets int32,
            -1 for padding.

        Raises:
            DataError: as `check`, when called outside compiled code.
        """
        return self.finish(self.draw(dataset, key), key)

    def draw(self, dataset: Dataset, key: PRNGKeyArray) -> Task:
        """The first half of `sample`: examples as stored, and padding not yet set to 0.

        Arguments and errors as for `sample`.
        """
        if not isinstance(dataset.count, jax.core.Tracer):
            self.require(dataset)
        self._check_sizes(*dataset.inputs.shape[:2])
        support, query = self._candidates(dataset)
        usable, sizes = self._usable(dataset, support, query)
        startable = usable & (sizes >= self.most_ways)
        group = self._group(dataset)

        keys = jax.random.split(key, KEYS)
        first = _draw(keys[0], startable.any(axis=0), 1)[0][
            0
        ]  # drawing a class draws its group too
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
        """The second half of `sample`: augment the images and set the padding to zero.

        Args:
            task: the task that `draw` returned.
            key: the key that was given to `draw`.

        Returns:
            The finished task.
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
        """Draw tasks number `first` to `first + tasks - 1` of the sequence that `key` defines.

        The sequence is endless, and task i is `sample(dataset, jax.random.fold_in(key, i))`.
        Therefore the tasks do not depend on the chunks, the order or the number of devices they are
        drawn in.

        Args:
            dataset: the classes to draw from.
            key: the PRNG key of the sequence.
            tasks: how many tasks to draw.
            first: the number of the first task; may be traced.

        Returns:
            The tasks, every array with a leading axis of length `tasks`.

        Raises:
            DataError: as `check`, when called outside compiled code.
        """
        return sample_numbered(lambda k: self.sample(dataset, k), key, tasks, first)

    def check(self, dataset: Dataset) -> None:
        """Check that these episodes can be drawn from a data set; call it outside compiled code.

        The names of classes with too few examples, which are never drawn, are logged.

        Args:
            dataset: the classes to draw from.

        Raises:
            DataError: the data set has too few classes, examples or families; the message says how
                many ways, shots and queries it allows.
        """
        usable = self.require(dataset)
        count = np.asarray(dataset.count)
        left_out = np.flatnonzero(~usable & (count > 0))
        if not len(left_out):
            return
        names = [f"{dataset.class_names[row]} ({count[row]})" for row in left_out[:NAMED]]
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        say_once(
            f"{dataset.name}/{dataset.split}: {len(left_out)} of {(count > 0).sum()} classes have "
            f"too few examples for shots={self.shots} and queries={self.queries} and are left out: "
            f"{', '.join(names)}{more}; uneven=True takes them with those they have"
        )

    def require(self, dataset: Dataset) -> Bool[np.ndarray, " classes"]:
        """Which classes have enough examples; `check` without the log line.

        Args:
            dataset: the classes to draw from.

        Raises:
            DataError: as `check`.
        """
        where = f"{dataset.name}/{dataset.split}"
        if self.cross_family and len(dataset.family_names) < 2:
            raise DataError(f"cross_family=True, but {where} has only one family of examples")
        with jax.ensure_compile_time_eval():  # so that it works where only the key is traced
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
        """Refuse sizes that exceed the shape of the data, which is known in compiled code too."""
        limits = {"ways": classes, "shots": examples, "queries": examples}
        if self.uneven:
            limits = {"ways": classes}
        for name, most in limits.items():
            if _ends(getattr(self, name))[1] > most:
                found = getattr(self, name)
                raise DataError(f"{name}={found} is too many for these data; use {name} <= {most}")

    def _too_few_examples(self, where: str, support: np.ndarray, query: np.ndarray) -> str:
        """The message for when no class has enough examples, with the largest sizes that fit."""
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
        """Masks of the possible support and query examples, for each ordered pair of families.

        Without `cross_family` there is one pair, for which every example may be either.
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
        """Which classes have enough examples, and how many of these are in each class's group."""
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
    """Numbers of support candidates, query candidates and usable classes in the class's group.

    Each is `[pairs, classes]`; the last is 0 for classes that are not usable themselves.
    """
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

    The choices with the largest of independent uniform scores are such a draw, in random order. The
    scores are float32 even with 64-bit JAX, so that a key gives the same episode in both modes.

    Returns:
        The choices, and which of them are allowed: not all, where fewer than `number` are.
    """
    scores = jax.random.uniform(key, allowed.shape, jnp.float32)
    there = min(number, allowed.shape[-1])
    scores, choices = jax.lax.top_k(jnp.where(allowed, scores, -1.0), there)
    lacking = [(0, 0)] * (choices.ndim - 1) + [(0, number - there)]
    return jnp.pad(choices, lacking), jnp.pad(scores >= 0, lacking)

"""Data sets that stay on the host, and the sampler that feeds the device from them."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from memmeta.data._dataset import Dataset
from memmeta.data._episodes import Episodes
from memmeta.data._numbered import sample_numbered, task_keys
from memmeta.problem import Task


@dataclass(frozen=True)
class HostDataset:
    """One split whose examples stay on the host, for data larger than the device's memory.

    Attributes:
        index: the data set with row numbers in place of the examples.
        rows: the examples, `[examples, *shape]`, usually memory-mapped.
    """

    index: Dataset
    rows: Shaped[np.ndarray, "rows ..."]

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.index.name

    @property
    def split(self) -> str:
        """The split's name."""
        return self.index.split

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.rows.shape[1:])

    def to_device(self) -> Dataset:
        """The same split with its examples on the default device."""
        inputs = np.asarray(self.index.inputs)
        examples = np.zeros((*inputs.shape, *self.example_shape), self.rows.dtype)
        for row, (numbers, count) in enumerate(zip(inputs, self.index.count, strict=True)):
            examples[row, :count] = self.rows[numbers[:count]]
        gathered: Dataset = jax.tree.map(jnp.asarray, replace(self.index, inputs=examples))
        return gathered


def on_host(dataset: Dataset) -> HostDataset:
    """Convert a `Dataset` to a `HostDataset`, so that both kinds can be treated alike.

    Example:
        >>> import memmeta.data
        >>> host = on_host(memmeta.data.load("glyphs", "test"))
        >>> host.rows.shape[1:], host.index.example_shape
        ((28, 28, 1), ())
    """
    inputs = np.asarray(dataset.inputs)
    numbers = np.arange(inputs.shape[0] * inputs.shape[1], dtype=np.int32)
    index = replace(dataset, inputs=numbers.reshape(inputs.shape[:2]))
    return HostDataset(index, inputs.reshape(-1, *inputs.shape[2:]))


def with_rotations(dataset: HostDataset) -> HostDataset:
    """Add every class rotated by 90, 180 and 270 degrees, each rotation as a class of its own.

    Source: Santoro, Bartunov, Botvinick, Wierstra, Lillicrap (ICML 2016), section 4.1.

    Args:
        dataset: a data set of square images.

    Returns:
        The data set with four times as many classes, in the host's memory.

    Example:
        >>> images = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2, 1)
        >>> letters = Dataset.from_arrays(images, ["a", "b", "a"])
        >>> turned = with_rotations(on_host(letters)).to_device()
        >>> turned.class_names[:4], turned.count.tolist()
        (('a 0°', 'b 0°', 'a 90°', 'b 90°'), [2, 1, 2, 1, 2, 1, 2, 1])
        >>> images[2, ..., 0].tolist(), turned.inputs[2, 1, ..., 0].tolist()
        ([[8, 9], [10, 11]], [[9, 11], [8, 10]])
    """
    rows = np.concatenate([np.rot90(dataset.rows, turn, axes=(1, 2)) for turn in range(4)])
    index, names = dataset.index, dataset.index.class_names
    starts = len(dataset.rows) * np.arange(4, dtype=np.int32)
    inputs = np.concatenate([np.asarray(index.inputs) + start for start in starts])
    turned = replace(
        index,
        inputs=inputs,
        count=np.tile(index.count, 4),
        group=np.tile(index.group, 4),
        family=np.tile(index.family, (4, 1)),
        class_names=tuple(f"{name} {angle}°" for angle in (0, 90, 180, 270) for name in names),
    )
    return HostDataset(turned, rows)


@dataclass(frozen=True)
class HostEpisodes:
    """Draws the tasks of `Episodes` from a data set on the host: the same tasks for the same key.

    The compiled sampler draws row numbers, the host gathers those rows, and the task is put on the
    device. Therefore its methods must be called outside compiled code.

    Attributes:
        episodes: the sampler that defines an episode.

    Example:
        >>> import memmeta.data
        >>> dataset = memmeta.data.load_host("glyphs", "test")
        >>> drawer = HostEpisodes(Episodes(ways=3, queries=2))
        >>> drawer.sample_batch(dataset, jax.random.key(0), 4).query_inputs.shape
        (4, 6, 28, 28, 1)
    """

    episodes: Episodes

    def check(self, dataset: HostDataset) -> None:
        """Check that the data set has enough classes and examples; as `Episodes.check`."""
        self.episodes.check(dataset.index)

    def sample_batch(
        self,
        dataset: HostDataset,
        key: Array,
        tasks: int,
        first: int | Int[Array, ""] = 0,
    ) -> Task:
        """Draw tasks number `first` to `first + tasks - 1`; as `Episodes.sample_batch`."""
        number = jnp.asarray(first, jnp.int32)
        drawn = _draw(self.episodes, dataset.index, key, tasks, number)
        support, query = np.asarray(drawn.support_inputs), np.asarray(drawn.query_inputs)
        gathered = drawn._replace(
            support_inputs=jnp.asarray(dataset.rows[support]),
            query_inputs=jnp.asarray(dataset.rows[query]),
        )
        finished: Task = _finish(self.episodes, gathered, key, tasks, number)
        return finished

    def stream(self, dataset: HostDataset, keys: Iterable[Array], tasks: int) -> Iterator[Task]:
        """Draw a batch for each key in turn; a thread prepares the next two while one is in use.

        Args:
            dataset: the classes to draw from.
            keys: one PRNG key for each batch, for example the key of each meta-step.
            tasks: tasks in a batch.

        Yields:
            `sample_batch(dataset, key, tasks)` for each key.
        """
        draw = partial(self.sample_batch, dataset, tasks=tasks)
        with ThreadPoolExecutor(max_workers=1) as pool:
            source = iter(keys)
            waiting = [pool.submit(draw, key) for key in islice(source, 2)]
            while waiting:
                batch = waiting.pop(0).result()
                waiting += [pool.submit(draw, key) for key in islice(source, 1)]
                yield batch


@partial(jax.jit, static_argnums=(0, 3))
def _draw(episodes: Episodes, index: Dataset, key: Array, tasks: int, first: Array) -> Task:
    return sample_numbered(lambda k: episodes.draw(index, k), key, tasks, first)


@partial(jax.jit, static_argnums=(0, 3))
def _finish(episodes: Episodes, drawn: Task, key: Array, tasks: int, first: Array) -> Task:
    return jax.vmap(episodes.finish)(drawn, task_keys(key, tasks, first))

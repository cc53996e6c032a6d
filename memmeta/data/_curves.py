"""Families of curves: regression tasks that are generated on the device instead of stored."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PRNGKeyArray

from memmeta.data._numbered import sample_numbered
from memmeta.problem import Task


@runtime_checkable
class Family(Protocol):
    """One split of a family of curves; a pytree that is passed to compiled functions.

    Attributes:
        name: the data set's name.
        split: "train", "validation" or "test".
        example_shape: the shape of one input.
    """

    name: str
    split: str

    @property
    def example_shape(self) -> tuple[int, ...]: ...

    def draw(
        self, key: PRNGKeyArray, points: int
    ) -> tuple[Float[Array, "points inputs"], Float[Array, "points outputs"]]:
        """Draw one curve, and `points` independent points on it; a pure function."""
        ...


@dataclass(frozen=True)
class Points:
    """A sampler of regression tasks: `shots` support and `queries` query points of one curve.

    Args:
        shots: support points.
        queries: query points.

    Raises:
        ValueError: `shots` or `queries` is not a positive integer.

    Example:
        >>> import jax
        >>> import memmeta.data
        >>> family = memmeta.data.load("sinusoid", "train")
        >>> sample = jax.jit(Points(shots=5, queries=20).sample_batch, static_argnums=2)
        >>> tasks = sample(family, jax.random.key(0), 4)
        >>> tasks.support_inputs.shape, tasks.query_targets.shape
        ((4, 5, 1), (4, 20, 1))
    """

    shots: int = 5
    queries: int = 50

    def __post_init__(self) -> None:
        for name in ("shots", "queries"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: it must be a positive integer")

    def check(self, dataset: Family) -> None:
        """Do nothing: any number of points can be drawn from a curve, so every size is allowed."""

    def sample(self, dataset: Family, key: PRNGKeyArray) -> Task:
        """Draw one task; a pure function that works under `jax.jit` and `jax.vmap`.

        Args:
            dataset: the family of curves.
            key: the PRNG key; the same key and family give the same task.

        Returns:
            The task: inputs `[points, inputs]` and targets `[points, outputs]`, float32.
        """
        inputs, targets = dataset.draw(key, self.shots + self.queries)
        return Task(
            inputs[: self.shots], targets[: self.shots], inputs[self.shots :], targets[self.shots :]
        )

    def sample_batch(
        self, dataset: Family, key: PRNGKeyArray, tasks: int, first: int | Int[Array, ""] = 0
    ) -> Task:
        """Draw tasks number `first` to `first + tasks - 1`; as `Episodes.sample_batch`."""
        return sample_numbered(lambda k: self.sample(dataset, k), key, tasks, first)

"""What a run is made of: its data, its compiled programs, and whether they fit the device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, Key

from memmeta import devices
from memmeta.algorithms import Learner
from memmeta.config import Config, UserError
from memmeta.data import DataError, Dataset, Episodes, Split, load
from memmeta.evaluate import Interval, confidence_interval
from memmeta.meta_step import MetaState, MetaStep, Metrics, make_meta_step
from memmeta.problem import Batch, MetaParams
from memmeta.trees import is_inexact

# Tags that keep the run's random draws apart from one another.
INIT, TRAIN, VALIDATION, TEST = range(4)
JUDGED_TOGETHER = 10  # episodes on each device: one program whatever their number


@dataclass(frozen=True)
class Trainer:
    """A run's compiled programs and its data; `train` drives it.

    Attributes:
        config: the options.
        learner: the method.
        meta_step: one outer iteration.
        splits: the data, by split name, on every device.
        training: the sampler of the tasks that are trained on.
        judged: the samplers of the tasks that are judged, by what they are called.
    """

    config: Config
    learner: Learner
    meta_step: MetaStep
    splits: dict[str, Dataset]
    training: Episodes
    judged: dict[str, Episodes]

    @property
    def everywhere(self) -> NamedSharding | None:
        """A copy on every device; None on one device."""
        mesh = self.meta_step.mesh
        return None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def init(self) -> MetaState:
        """The state before the first meta-step."""
        key = jax.random.key(self.config.seed)
        theta = jax.jit(self.learner.init)(jax.random.fold_in(key, INIT))
        return self.meta_step.init(theta, key)

    def batch(self, state: MetaState, dataset: Dataset) -> Batch:
        """The tasks of the meta-step that `state` is about to make, where they will be used."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, TRAIN), state.step)
        draw = devices.draw(self.meta_step.mesh, self.training.sample_batch, self.config.tasks)
        return draw(dataset, key)

    def compile(self) -> jax.stages.Compiled:
        """(state, train split, count) -> (state, mean metrics): `count` meta-steps as one program.

        The count is traced, so that one compilation serves the last, shorter block too. The state
        is donated. `.memory_analysis()` tells what it needs.
        """

        @jax.jit  # traced once, for its shapes and for the loop
        def one_step(state: MetaState, dataset: Dataset) -> tuple[MetaState, Metrics]:
            state, metrics = self.meta_step.update(state, self.batch(state, dataset))
            return state, metrics._replace(tasks=None)

        @partial(jax.jit, donate_argnums=0, out_shardings=self.everywhere)
        def block(
            state: MetaState, dataset: Dataset, count: Int32[Array, ""]
        ) -> tuple[MetaState, Metrics]:
            def body(_: Array, carry: tuple[MetaState, Metrics]) -> tuple[MetaState, Metrics]:
                state, total = carry
                state, found = one_step(state, dataset)
                return state, _sum(total, found)

            shapes = jax.eval_shape(one_step, state, dataset)[1]
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            none_met = jnp.full_like(zeros.report.smallest_curvature, jnp.inf)
            start = zeros._replace(report=zeros.report._replace(smallest_curvature=none_met))
            state, total = jax.lax.fori_loop(0, count, body, (state, start))
            means = jax.tree.map(lambda x: x / count.astype(x.dtype) if is_inexact(x) else x, total)
            smallest = total.report.smallest_curvature
            return state, means._replace(report=means.report._replace(smallest_curvature=smallest))

        return block.lower(self.init(), self.splits["train"], jnp.int32(1)).compile()

    @cached_property
    def evaluator(self) -> Callable[[MetaState, str, Episodes, int, int], Interval]:
        """(state, split, episodes, number, tag) -> accuracy over that many fixed episodes."""
        learner = self.config.learner(self.splits["test"], test=True)
        mesh = self.meta_step.mesh
        together = JUDGED_TOGETHER * devices.shards(mesh)

        @partial(jax.jit, static_argnums=2, out_shardings=self.everywhere)
        def accuracies(
            theta: MetaParams,
            dataset: Dataset,
            episodes: Episodes,
            first: Int32[Array, ""],
            key: Key[Array, ""],
        ) -> Float[Array, " tasks"]:
            def judged(
                theta: MetaParams,
                dataset: Dataset,
                key: Key[Array, ""],
                numbers: Int32[Array, " share"],
            ) -> Float[Array, " share"]:
                tasks = episodes.sample_batch(dataset, key, numbers.size, numbers[0])
                return learner.evaluate(theta, tasks).aux["accuracy"]

            numbers = first + jnp.arange(together, dtype=jnp.int32)
            return devices.spread(mesh, judged, split=1, out=True)(theta, dataset, key, numbers)

        def evaluate(
            state: MetaState, split: str, episodes: Episodes, count: int, tag: int
        ) -> Interval:
            # The same episodes whatever the run's seed, so that runs can be compared.
            key = jax.random.fold_in(jax.random.key(0), tag)
            dataset = self.splits[split]
            episodes.check(dataset)
            found = [
                accuracies(state.meta_params, dataset, episodes, jnp.int32(first), key)
                for first in range(0, count, together)
            ]
            return confidence_interval(np.concatenate(found)[:count])

        return evaluate


def _sum(total: Metrics, found: Metrics) -> Metrics:
    """Two metrics' sum; of the smallest curvatures the smaller."""
    pair = (total.report.smallest_curvature, found.report.smallest_curvature)
    both = jax.tree.map(jnp.add, total, found)
    return both._replace(report=both.report._replace(smallest_curvature=jnp.minimum(*pair)))


def make_trainer(config: Config, mesh: Mesh | None = None) -> Trainer:
    """Load the data and put a run's pieces together.

    Args:
        config: the options.
        mesh: the devices to spread tasks over, see `memmeta.make_meta_step`.

    Returns:
        The trainer.

    Raises:
        DataError: the data are missing, altered or too few for the tasks asked for.
        ValueError: the tasks cannot be shared out evenly over the devices.
    """
    names = ("train", "validation", "test")
    splits = {name: _classes(load(config.data, name, config.data_dir)) for name in names}
    normalised = config.normalised(splits["train"])
    training = config.training_episodes(splits["train"], normalised)
    judged = config.test_episodes(splits["train"], normalised)
    training.check(splits["train"])
    for name, sampler in product(("validation", "test"), judged.values()):
        sampler.check(splits[name])
    learner = config.learner(splits["train"])
    meta_step = make_meta_step(
        learner.problem,
        learner.inner,
        learner.estimator,
        config.optimizer(),
        task_chunk=config.task_chunk or "auto",
        mesh=mesh,
    )
    placed = {name: devices.place(meta_step.mesh, split) for name, split in splits.items()}
    return Trainer(config, learner, meta_step, placed, training, judged)


def _classes(split: Split) -> Dataset:
    if not isinstance(split, Dataset):
        raise DataError(
            f"data: {split.name} has curves, and the command line trains classifiers; use a "
            "Problem of your own with memmeta.make_meta_step, or a data set of classes"
        )
    return split


def check_room(trainer: Trainer, block: jax.stages.Compiled) -> None:
    """Say before a run starts that it will not fit, and what would.

    Args:
        trainer: of the run.
        block: from `trainer.compile()`.

    Raises:
        UserError: the device has less memory than the compiled program needs.
    """
    needed, free = devices.needed_bytes(block), devices.free_bytes()
    if jax.default_backend() == "cpu" and needed is not None:
        needed *= jax.local_device_count() if trainer.meta_step.mesh else 1
    if needed is None or free is None or needed <= free:
        return
    step = trainer.meta_step
    state = jax.eval_shape(trainer.init)
    chunk = step.chunk(jax.eval_shape(trainer.batch, state, trainer.splits["train"]))
    found = f"a meta-step needs {needed / 1e9:.3g} GB, there are {free / 1e9:.3g} GB"
    smallest = needed
    if chunk > 1:
        one = replace(trainer, meta_step=replace(step, task_chunk=1)).compile()
        of_block = devices.needed_bytes(block) or needed
        smallest = round((devices.needed_bytes(one) or 0) * needed / of_block)
    if smallest > free:
        raise UserError(
            f"task_chunk: {found}, and with --task-chunk 1 it would still need "
            f"{smallest / 1e9:.3g} GB; use a smaller --width, --shots or --queries, or more devices"
        )
    each = (needed - smallest) / (chunk - 1)  # memory is a straight line in the chunk
    fitting = max(
        size
        for size in range(1, chunk)
        if chunk % size == 0 and (size == 1 or smallest + each * (size - 1) <= free)
    )
    raise UserError(
        f"task_chunk: {found}; --task-chunk {fitting} would need about "
        f"{(smallest + each * (fitting - 1)) / 1e9:.3g} GB and changes no result but by rounding"
    )

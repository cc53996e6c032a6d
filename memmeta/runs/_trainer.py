"""The trainer: a run's data and compiled programs, and the check that they fit in memory."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, Key, PyTree

from memmeta.data import (
    DataError,
    Dataset,
    Episodes,
    HostDataset,
    HostEpisodes,
    Limits,
    load,
    load_host,
)
from memmeta.data._reading import Progress, silent
from memmeta.data._registry import Split
from memmeta.few_shot.algorithms import Learner
from memmeta.meta import _mesh as mesh_of
from memmeta.meta._evaluation import Interval, confidence_interval
from memmeta.meta._state import MetaState
from memmeta.meta._step import MetaStep
from memmeta.problem import Batch, MetaParams, Params
from memmeta.runs import _blocks as blocks
from memmeta.runs import _devices as devices
from memmeta.runs import checkpoints
from memmeta.runs._blocks import Block
from memmeta.runs._config import Config, UserError
from memmeta.runs._fitting import fitting

log = logging.getLogger("memmeta")

# Folded into the key, so that a run's random draws for different purposes are independent.
INIT, TRAIN, VALIDATION, TEST = range(4)
JUDGED_TOGETHER = 10  # episodes per device and call; fixed, so that one program serves any number


@dataclass(frozen=True)
class Trainer:
    """A run's data and the functions that train and evaluate on it; see `train`.

    Attributes:
        config: the options.
        learner: the method.
        meta_step: the function that makes one meta-step.
        splits: the data by split name, on every device or on the host.
        training: the sampler of the training tasks.
        judged: the samplers of the tasks for evaluation, by their names in the report.
        head: the random head that every task starts from; None if they start from zeros.
    """

    config: Config
    learner: Learner
    meta_step: MetaStep
    splits: dict[str, Dataset | HostDataset]
    training: Episodes
    judged: dict[str, Episodes]
    head: Params | None = None

    @property
    def usual(self) -> Episodes:
        """The sampler of validation and of comparisons: the first of `judged`."""
        return next(iter(self.judged.values()))

    @property
    def everywhere(self) -> NamedSharding | None:
        """The sharding that copies an array to every device; None on one device."""
        mesh = self.meta_step.mesh
        return None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def init(self) -> MetaState:
        """The state before the first meta-step."""
        key = jax.random.key(self.config.seed)
        theta = jax.jit(self.learner.init)(jax.random.fold_in(key, INIT))
        return self.meta_step.init(theta, key)

    def stored(self, state: MetaState) -> PyTree:
        """What a checkpoint of a state holds: the state, and the random head if there is one."""
        if self.head is None:
            return state
        head = jax.tree.map(jnp.asarray, self.head)
        return {"state": state, "head": mesh_of.place(self.meta_step.mesh, head)}

    def restored(self, folder: Path) -> tuple["Trainer", MetaState]:
        """The trainer with the random head of the newest checkpoint in a folder, and its state.

        Raises:
            CheckpointError: there is no checkpoint, all are damaged, or it is of another model.
        """
        found = checkpoints.restore(folder, self.stored(self.init()))
        if self.head is None:
            return self, found
        head = jax.device_get(found["head"])
        learner = self.config.learner(self.splits["train"].example_shape, head=head)
        meta_step = replace(self.meta_step, problem=learner.problem)
        return replace(self, learner=learner, meta_step=meta_step, head=head), found["state"]

    def tasks(
        self,
        episodes: Episodes,
        dataset: Dataset | HostDataset,
        key: Key[Array, ""],
        count: int,
        first: int = 0,
    ) -> Batch:
        """Draw tasks `first` to `first + count - 1` of the sequence that `key` defines.

        They are placed on the devices that use them. The tasks are the same for data on the host as
        on devices, but tasks from the host can only be drawn outside compiled code.
        """
        mesh, number = self.meta_step.mesh, jnp.asarray(first, jnp.int32)
        if isinstance(dataset, HostDataset):
            drawn = HostEpisodes(episodes).sample_batch(dataset, _here(key), count, number)
            return mesh_of.place(mesh, drawn, PartitionSpec(mesh_of.TASKS))
        return _drawn(mesh, episodes, count, dataset, key, number)

    def batch(self, state: MetaState, dataset: Dataset | HostDataset) -> Batch:
        """The tasks of the meta-step that follows `state`, on the devices that use them."""
        key = jax.random.fold_in(jax.random.fold_in(state.key, TRAIN), state.step)
        return self.tasks(self.training, dataset, key, self.config.tasks)

    def batches(self, state: MetaState, dataset: HostDataset, count: int) -> Iterator[Batch]:
        """Yield `batch` of the next `count` meta-steps, prepared while the one before is in use."""
        key, step = jax.random.fold_in(_here(state.key), TRAIN), int(state.step)
        keys = (jax.random.fold_in(key, number) for number in range(step, step + count))
        for drawn in HostEpisodes(self.training).stream(dataset, keys, self.config.tasks):
            yield mesh_of.place(self.meta_step.mesh, drawn, PartitionSpec(mesh_of.TASKS))

    def compile(self) -> Block:
        """Compile the block of meta-steps between two log points."""
        state, dataset, where = self.init(), self.splits["train"], self.everywhere
        if isinstance(dataset, HostDataset):
            batch = self.batch(state, dataset)
            return blocks.on_host(self.meta_step, self.batches, state, batch, where)
        return blocks.on_device(self.meta_step, self.batch, state, dataset, where)

    @property
    def judge(self) -> Learner:
        """The method as it is evaluated."""
        shape = self.splits["test"].example_shape
        return self.config.learner(shape, test=True, head=self.head)

    @cached_property
    def evaluator(self) -> Callable[[MetaState, str, Episodes, int, int], Interval]:
        """A function from (state, split, episodes, count, tag) to a mean accuracy."""
        evaluate = self.accuracies
        return lambda *where: _interval(evaluate(*where), where[1])

    @cached_property
    def accuracies(
        self,
    ) -> Callable[[MetaState, str, Episodes, int, int], Float[np.ndarray, " episodes"]]:
        """A function from (state, split, episodes, count, tag) to the accuracy of each episode.

        It evaluates `count` episodes, which depend on the tag but not on the run's seed.
        """
        learner = self.judge
        mesh = self.meta_step.mesh
        together = JUDGED_TOGETHER * mesh_of.shards(mesh)

        @partial(jax.jit, out_shardings=self.everywhere)
        def accuracies(theta: MetaParams, tasks: Batch) -> Float[Array, " tasks"]:
            def of_share(theta: MetaParams, tasks: Batch) -> Float[Array, " share"]:
                accuracy: Array = learner.evaluate(theta, tasks).aux["accuracy"]
                return accuracy

            accuracies: Array = mesh_of.spread(mesh, of_share, split=1, out=True)(theta, tasks)
            return accuracies

        def evaluate(
            state: MetaState, split: str, episodes: Episodes, count: int, tag: int
        ) -> Float[np.ndarray, " episodes"]:
            # The same episodes whatever the run's seed, so that runs can be compared.
            key = jax.random.fold_in(jax.random.key(0), tag)
            dataset = self.splits[split]
            episodes.check(_index(dataset))
            found = []
            for first in range(0, count, together):
                tasks = self.tasks(episodes, dataset, key, together, first)
                # Wait for each result before the next call: with several programs under way, all
                # threads of a CPU could be waiting for other devices, and none left to compute.
                found.append(np.asarray(accuracies(state.meta_params, tasks)))
            return np.concatenate(found)[:count]

        return evaluate


def _interval(accuracies: Float[np.ndarray, " episodes"], split: str) -> Interval:
    """The mean over the episodes with a finite accuracy; the number of others is logged."""
    usable = accuracies[np.isfinite(accuracies)]
    if (lost := accuracies.size - usable.size) > 0:
        log.warning("%s: %d of %d episodes left out: no finite loss", split, lost, accuracies.size)
    return confidence_interval(usable) if usable.size > 1 else Interval(math.nan, math.nan)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _drawn(
    mesh: Mesh | None,
    episodes: Episodes,
    count: int,
    dataset: Dataset,
    key: Key[Array, ""],
    first: Int32[Array, ""],
) -> Batch:
    return mesh_of.draw(mesh, episodes.sample_batch, count)(dataset, key, first)


def _here(key: Key[Array, ""]) -> Key[Array, ""]:
    """A copy of the key on one device of this process, so that what it draws is there alone."""
    words = jnp.asarray(np.asarray(jax.random.key_data(key)))
    restored: Array = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
    return restored


def _index(split: Dataset | HostDataset) -> Dataset:
    """The `Dataset` with the classes of a split, wherever the examples are."""
    return split.index if isinstance(split, HostDataset) else split


def make_trainer(
    config: Config,
    mesh: Mesh | None = None,
    limits: Limits = Limits(),
    progress: Progress = silent,
) -> Trainer:
    """Load the data of a run and make the trainer that `train` takes.

    Args:
        config: the options.
        mesh: the devices to spread tasks over, see `memmeta.make_meta_step`.
        limits: limits on what data files may contain.
        progress: shows how far a conversion or a check of the data is.

    Returns:
        A trainer with

        - `learner`: the method;
        - `splits`: the data by split name;
        - `judged`: the samplers of episodes for evaluation, by name;
        - `init()`: returns the state before the first meta-step;
        - `batch(state, split)`: returns the tasks of the meta-step that follows a state;
        - `compile()`: returns the block of meta-steps between two log points;
        - `stored(state)`: returns what a checkpoint holds;
        - `restored(folder)`: returns the trainer and the state of the newest checkpoint;
        - `evaluator(state, split, episodes, count, tag)`: returns the mean accuracy on `count`
          episodes that the sampler `episodes` draws.

    Raises:
        DataError: the data are missing, altered or too few for the tasks.
        ValueError: the number of devices does not divide the number of tasks.
    """
    names = ("train", "validation", "test")
    read = load_host if config.on_host else load
    how = config.reading(limits, progress)
    splits = {name: _classes(read(config.data, name, config.data_dir, how)) for name in names}
    train, normalised = _index(splits["train"]), config.normalised(splits["train"])
    training = config.training_episodes(train, normalised)
    evaluation = config.test_episodes(train, normalised)
    judged = [_index(splits[name]) for name in ("validation", "test")]
    if config.queries is None:
        training = fitting(training, [train])
    if config.test_queries is None:
        evaluation = {name: fitting(sampler, judged) for name, sampler in evaluation.items()}
    training.check(train)
    for split, sampler in product(judged, evaluation.values()):
        try:
            sampler.check(split)
        except DataError as error:  # two options are called queries, and here the second is meant
            said = re.sub(r"\bqueries(?=\b[=\s])", "test_queries", str(error))
            raise DataError(said) from error
    head = config.drawn_head(splits["train"].example_shape)
    learner = config.learner(splits["train"].example_shape, head=head)
    meta_step = learner.make_meta_step(
        config.optimizer(), task_chunk=config.task_chunk or "auto", mesh=mesh, report="full"
    )
    if not config.on_host:
        splits = {name: mesh_of.place(meta_step.mesh, split) for name, split in splits.items()}
    return Trainer(config, learner, meta_step, splits, training, evaluation, head)


def _classes(split: Split | HostDataset) -> Dataset | HostDataset:
    if not isinstance(split, Dataset | HostDataset):
        raise DataError(
            f"data: {split.name} has curves, and the command line trains classifiers; use a "
            "Problem of your own with memmeta.make_meta_step, or a data set of classes"
        )
    return split


def check_room(trainer: Trainer, block: Block) -> None:
    """Check before a run starts that it fits in memory.

    Args:
        trainer: the run's trainer.
        block: the result of `trainer.compile()`.

    Raises:
        UserError: the device has less memory than the compiled program needs; the message names a
            task chunk that fits, if there is one.
    """
    needed, free = devices.needed_bytes(block.program), devices.free_bytes()
    if jax.default_backend() == "cpu" and needed is not None:
        needed *= jax.local_device_count() if trainer.meta_step.mesh else 1
    if needed is None or free is None or needed <= free:
        return
    step = trainer.meta_step
    chunk = step.chunk(trainer.batch(trainer.init(), trainer.splits["train"]))
    found = f"a meta-step needs {needed / 1e9:.3g} GB, there are {free / 1e9:.3g} GB"
    smallest = needed
    if chunk > 1:
        one = replace(trainer, meta_step=replace(step, task_chunk=1)).compile()
        of_block = devices.needed_bytes(block.program) or needed
        smallest = round((devices.needed_bytes(one.program) or 0) * needed / of_block)
    if smallest > free:
        raise UserError(
            f"task_chunk: {found}, and with --task-chunk 1 it would still need "
            f"{smallest / 1e9:.3g} GB; use a smaller --width, --shots or --queries, or more devices"
        )
    each = (needed - smallest) / (chunk - 1)  # memory grows linearly with the chunk
    fitting = max(
        size
        for size in range(1, chunk)
        if chunk % size == 0 and (size == 1 or smallest + each * (size - 1) <= free)
    )
    raise UserError(
        f"task_chunk: {found}; --task-chunk {fitting} would need about "
        f"{(smallest + each * (fitting - 1)) / 1e9:.3g} GB and changes no result but by rounding"
    )

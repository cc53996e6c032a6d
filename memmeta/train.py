"""Training: many meta-steps a compiled call, log points, checkpoints, and the final report."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from memmeta import checkpoints
from memmeta.algorithms import Learner
from memmeta.config import Config
from memmeta.data import Dataset, Episodes, load
from memmeta.evaluate import Interval, confidence_interval
from memmeta.meta_step import MetaState, MetaStep, Metrics
from memmeta.run_folder import RunFolder
from memmeta.trees import is_inexact

# Tags that keep the run's random draws apart from one another.
INIT, TRAIN, VALIDATION, TEST = range(4)
VALIDATION_EPISODES = 100


@dataclass(frozen=True)
class Trainer:
    """A run's compiled programs and its data; `train` drives it.

    Attributes:
        config: the options.
        learner: the method.
        meta_step: one outer iteration.
        splits: the data, by split name.
    """

    config: Config
    learner: Learner
    meta_step: MetaStep
    splits: dict[str, Dataset]

    def init(self) -> MetaState:
        """The state before the first meta-step."""
        key = jax.random.key(self.config.seed)
        return self.meta_step.init(self.learner.init(jax.random.fold_in(key, INIT)), key)

    def compile(self) -> jax.stages.Compiled:
        """(state, train split, count) -> (state, mean metrics): `count` meta-steps as one program.

        The count is traced, so that one compilation serves the last, shorter block too. The state
        is donated. `.memory_analysis()` tells what it needs.
        """
        episodes = self.config.episodes_of(cross_family=self.config.cross_family)

        def one_step(state: MetaState, dataset: Dataset) -> tuple[MetaState, Metrics]:
            key = jax.random.fold_in(jax.random.fold_in(state.key, TRAIN), state.step)
            tasks = episodes.sample_batch(dataset, key, self.config.tasks)
            state, metrics = self.meta_step.update(state, tasks)
            return state, metrics._replace(tasks=None)

        @partial(jax.jit, donate_argnums=0)
        def block(
            state: MetaState, dataset: Dataset, count: Int32[Array, ""]
        ) -> tuple[MetaState, Metrics]:
            def body(_: Array, carry: tuple[MetaState, Metrics]) -> tuple[MetaState, Metrics]:
                state, total = carry
                state, found = one_step(state, dataset)
                smallest = jnp.minimum(
                    total.report.smallest_curvature, found.report.smallest_curvature
                )
                total = jax.tree.map(jnp.add, total, found)
                return state, total._replace(
                    report=total.report._replace(smallest_curvature=smallest)
                )

            shapes = jax.eval_shape(one_step, state, dataset)[1]
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            none_met = jnp.full_like(zeros.report.smallest_curvature, jnp.inf)
            start = zeros._replace(report=zeros.report._replace(smallest_curvature=none_met))
            state, total = jax.lax.fori_loop(0, count, body, (state, start))
            means = jax.tree.map(
                lambda x: x / count.astype(x.dtype) if is_inexact(x) else x, total
            )
            smallest = total.report.smallest_curvature
            return state, means._replace(
                report=means.report._replace(smallest_curvature=smallest)
            )

        state = jax.eval_shape(self.init)
        return block.lower(state, self.splits["train"], jnp.int32(1)).compile()

    def evaluator(self) -> Callable[[MetaState, str, Episodes, int, int], Interval]:
        """(state, split, episodes, number, tag) -> accuracy over that many fixed episodes."""
        learner = self.config.learner(self.splits["test"], test=True)

        @partial(jax.jit, static_argnums=(2, 3))
        def accuracies(
            meta_params: Any, dataset: Dataset, episodes: Episodes, count: int, key: Array
        ) -> Array:
            tasks = episodes.sample_batch(dataset, key, count)
            found = learner.evaluate(meta_params, tasks, task_chunk=10)
            return found.aux["accuracy"]

        def evaluate(
            state: MetaState, split: str, episodes: Episodes, count: int, tag: int
        ) -> Interval:
            # The same episodes whatever the run's seed, so that runs can be compared.
            key = jax.random.fold_in(jax.random.key(0), tag)
            dataset = self.splits[split]
            episodes.check(dataset)
            found = accuracies(state.meta_params, dataset, episodes, count, key)
            return confidence_interval(np.asarray(found))

        return evaluate


def make_trainer(config: Config) -> Trainer:
    """Load the data and put a run's pieces together.

    Args:
        config: the options.

    Returns:
        The trainer.

    Raises:
        DataError: the data are missing, altered or too few for the tasks asked for.
    """
    names = ("train", "validation", "test")
    splits = {name: load(config.data, name, config.data_dir) for name in names}
    episodes = config.episodes_of(cross_family=config.cross_family)
    for dataset in splits.values():
        episodes.check(dataset)
    learner = config.learner(splits["train"])
    chunk = config.task_chunk or default_chunk(config.tasks)
    meta_step = learner.make_meta_step(config.optimizer(), task_chunk=chunk)
    return Trainer(config, learner, meta_step, splits)


def default_chunk(tasks: int) -> int:
    """Tasks worked on at once: few on a CPU, whose caches are small; all on a GPU or TPU."""
    wanted = 4 if jax.default_backend() == "cpu" else tasks
    return max(chunk for chunk in range(1, wanted + 1) if tasks % chunk == 0)


def train(
    trainer: Trainer,
    block: jax.stages.Compiled,
    folder: RunFolder,
    resume: bool,
    show: Callable[[dict[str, Any]], None] = lambda line: None,
) -> MetaState:
    """Run to the last meta-step, with a log point and maybe a checkpoint after every block.

    Args:
        trainer: what to run.
        block: from `trainer.compile()`.
        folder: where metrics and checkpoints go.
        resume: go on from the newest checkpoint instead of starting anew.
        show: called with every log point.

    Returns:
        The state at the end.

    Raises:
        CheckpointError: there is nothing to resume from.
        OSError: the folder cannot be written; what was written stays.
    """
    config, state = trainer.config, trainer.init()
    evaluate = trainer.evaluator()
    validation = config.episodes_of(cross_family=config.cross_family)
    if resume:
        state = checkpoints.restore(folder.checkpoints, state)
        folder.keep_metrics_until(int(state.step))
    while (step := int(state.step)) < config.meta_steps:
        count = min(config.log_every - step % config.log_every, config.meta_steps - step)
        began = time.perf_counter()
        state, metrics = block(state, trainer.splits["train"], jnp.int32(count))
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        step += count
        line = log_point(step, metrics, count * config.tasks / seconds)
        last = step == config.meta_steps
        if last or step % config.checkpoint_every == 0:
            found = evaluate(state, "validation", validation, VALIDATION_EPISODES, VALIDATION)
            line |= {"validation_accuracy": found.mean, "validation_interval": found.half_width}
        folder.append_metrics(line)
        show(line)
        if last or step % config.checkpoint_every == 0:
            checkpoints.save(folder.checkpoints, step, state)
    return state


def log_point(step: int, metrics: Metrics, tasks_per_second: float) -> dict[str, Any]:
    """The metrics of a block as one flat line of plain numbers."""
    report = metrics.report._asdict()
    figures = {
        "loss": metrics.loss,
        **metrics.aux,
        **report,
        "gradient_norm": metrics.gradient_norm,
    }
    line: dict[str, Any] = {"step": step}
    line |= {name: float(value) for name, value in figures.items()}
    return line | {"masked": int(metrics.masked), "tasks_per_second": tasks_per_second}


def final_report(
    trainer: Trainer, block: jax.stages.Compiled, state: MetaState, folder: RunFolder
) -> dict[str, Any]:
    """Accuracy on held-out test episodes, speed, and memory.

    Args:
        trainer: of the run.
        block: from `trainer.compile()`.
        state: at the end of the run.
        folder: whose metrics hold the speed.

    Returns:
        A JSON-ready dict.
    """
    config, evaluate = trainer.config, trainer.evaluator()
    any_style = config.episodes_of(cross_family=False)
    accuracy = {"any styles": evaluate(state, "test", any_style, config.episodes, TEST)}
    if len(trainer.splits["test"].family_names) > 1:
        # ten styles a family, so fewer queries than within one
        other_family = config.episodes_of(cross_family=True, queries=min(config.queries, 5))
        accuracy["different font families"] = evaluate(
            state, "test", other_family, config.episodes, TEST
        )
    speeds = [line["tasks_per_second"] for line in folder.metrics()[1:]]
    memory = block.memory_analysis()
    return {
        "method": config.method,
        "data": config.data,
        "meta_steps": int(state.step),
        "ways": config.ways,
        "shots": config.shots,
        "episodes": config.episodes,
        "accuracy": {
            name: {"mean": found.mean, "interval": found.half_width}
            for name, found in accuracy.items()
        },
        "meta_steps_per_second": float(np.median(speeds) / config.tasks) if speeds else None,
        "meta_step_temporary_bytes": int(memory.temp_size_in_bytes) if memory else None,
        "backend": jax.default_backend(),
    }

"""Evaluation of runs for the report: their stored metrics and their newest checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memmeta.data import DataError, Dataset, Episodes, HostDataset, Limits
from memmeta.few_shot.algorithms import Learner
from memmeta.meta._evaluation import Interval, confidence_interval
from memmeta.problem import MetaParams, Params, Scalar, Task
from memmeta.runs import checkpoints
from memmeta.runs._config import Config
from memmeta.runs._folder import RunFolder
from memmeta.runs._records import FinalReport
from memmeta.runs._stored import confirmed, require_unaltered
from memmeta.runs._trainer import TEST, make_trainer


@dataclass(frozen=True)
class Episode:
    """One test task with the learner's predictions for its query examples.

    Attributes:
        group: the name of the group that its classes are from.
        task: the task, as NumPy arrays.
        before: the predicted probabilities before adaptation, `[query, ways]`.
        after: the predicted probabilities after the inner loop.
    """

    group: str
    task: Task
    before: Float[np.ndarray, "query ways"]
    after: Float[np.ndarray, "query ways"]


@dataclass(frozen=True)
class Judged:
    """An evaluated run, as it is shown on the page.

    Attributes:
        name: the name of its folder, preceded by the parent's where two folders have the same name.
        config: its options.
        lines: its log points.
        final: its final report; None if it has not ended.
        step: the meta-step of the checkpoint that was evaluated; None if there is no checkpoint.
        groups: the accuracy on test episodes from a single group, by the group's name.
        episode: one test task; None if there is no checkpoint.
    """

    name: str
    config: Config
    lines: list[dict[str, Any]]
    final: FinalReport | None
    step: int | None
    groups: dict[str, Interval]
    episode: Episode | None


def judge_all(
    paths: Sequence[Path],
    episodes: int,
    data_dir: Path | None = None,
    limits: Limits = Limits(),
    network: str | None = None,
) -> list[Judged]:
    """Read run folders and evaluate the newest checkpoint of each run on test episodes.

    Args:
        paths: the run folders.
        episodes: the number of test episodes of each group, at least 2.
        data_dir: the folder of the runs' data, if these are not part of the package.
        limits: limits on what data files may contain.
        network: the network of the user's own that the runs have; None without one.

    Returns:
        For each run an object with the attributes that `write` shows:

        - `name`: the name of its folder, preceded by the parent's where two have the same name;
        - `config`: its options;
        - `lines`: its log points so far;
        - `final`: its final report; None if it has not ended;
        - `step`: the meta-step of the checkpoint that was evaluated; None if there is none;
        - `groups`: the accuracy on test episodes from a single group, by the group's name;
        - `episode`: one test task with the learner's probabilities `before` and `after`
          adaptation; None if there is no checkpoint.

    Raises:
        UserError: a folder is not a run folder, or its data need `data_dir`.
        FileError: metrics or a report cannot be read.
        DataError: the data of a run are missing or altered.
    """
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-2:]) for path in paths]
    pairs = zip(paths, names, strict=True)
    return [judge(path, name, episodes, data_dir, limits, network) for path, name in pairs]


def judge(
    path: Path,
    name: str,
    episodes: int,
    data_dir: Path | None = None,
    limits: Limits = Limits(),
    network: str | None = None,
) -> Judged:
    """Evaluate one run for `judge_all`, which chooses its name on the page."""
    folder = RunFolder(path)
    config = folder.config()
    known = partial(Judged, name, config, folder.metrics(), folder.final_report())
    if not checkpoints.whole(folder.checkpoints):
        return known(None, {}, None)
    require_unaltered(folder, config)
    made = make_trainer(confirmed(config, data_dir, network), limits=limits)
    trainer, state = made.restored(folder.checkpoints)
    test = trainer.splits["test"]
    dataset = test.to_device() if isinstance(test, HostDataset) else test
    sampler = trainer.usual
    groups = by_group(trainer.judge, state.meta_params, dataset, sampler, episodes)
    episode = one_episode(trainer.judge, state.meta_params, dataset, sampler, config.ways)
    return known(int(state.step), groups, episode)


def only(dataset: Dataset, group: int) -> Dataset:
    """The data set with no examples in the classes of other groups, so that shapes stay equal."""
    return replace(dataset, count=jnp.where(dataset.group == group, dataset.count, 0))


def by_group(
    learner: Learner, meta_params: MetaParams, dataset: Dataset, sampler: Episodes, count: int
) -> dict[str, Interval]:
    """Accuracy on episodes from a single group, for each group that has enough classes."""

    @jax.jit
    def accuracies(meta_params: MetaParams, dataset: Dataset, key: Array) -> Array:
        tasks = sampler.sample_batch(dataset, key, count)
        found = learner.evaluate(meta_params, tasks, task_chunk=min(count, 10))
        accuracy: Array = found.aux["accuracy"]
        return accuracy

    found = {}
    for index, name in enumerate(dataset.group_names):
        part = only(dataset, index)
        try:
            sampler.check(part)
        except DataError:
            continue
        found[name] = confidence_interval(accuracies(meta_params, part, _key(index)))
    return found


def one_episode(
    learner: Learner, meta_params: MetaParams, dataset: Dataset, sampler: Episodes, ways: int
) -> Episode:
    """The first test task and the predictions for it before and after adaptation.

    If episodes of the data set are from one group, the task is from that with the most classes.
    """
    sizes = np.bincount(np.asarray(dataset.group), minlength=len(dataset.group_names))
    largest = int(sizes.argmax())
    whole = dataset if not dataset.within_group else only(dataset, largest)
    group = dataset.group_names[largest] if dataset.within_group else "all classes"

    @jax.jit
    def both(meta_params: MetaParams, dataset: Dataset, key: Array) -> tuple[Task, Array, Array]:
        task = sampler.sample(dataset, key)
        problem, start = learner.problem, learner.problem.init(meta_params)
        adapted = learner.inner(problem, start, problem.embed(meta_params, task))
        say = partial(probabilities, learner, meta_params, task, ways=ways)
        return task, say(params=start), say(params=adapted)

    task, before, after = both(meta_params, whole, _key(largest))
    task = jax.tree.map(np.asarray, task)
    return Episode(group, task, np.asarray(before), np.asarray(after))


def probabilities(
    learner: Learner, meta_params: MetaParams, task: Task, params: Params, ways: int
) -> Float[Array, "query ways"]:
    r"""The learner's class probabilities of each query example, computed from its outer loss.

    $$p_j(c) \propto \exp(-m f(y_1 \dots y_{j-1}, c, y_{j+1} \dots y_m))$$

    holds because f is the mean of the m cross-entropies −log p_j(y_j), so that changing one target
    changes one term. Only the targets differ, so the network is still evaluated once.

    Args:
        learner: a learner whose outer loss is a mean cross-entropy.
        meta_params: the meta-parameters θ.
        task: one task.
        params: the task parameters φ.
        ways: the number of classes.

    Returns:
        Probabilities; each row sums to 1.
    """
    problem, targets = learner.problem, task.query_targets
    number = targets.shape[0]

    def loss(query: Array, target: Array) -> Scalar:
        changed = task._replace(query_targets=targets.at[query].set(target))
        return problem.outer_loss(params, problem.embed(meta_params, changed))[0]

    queries, classes = jnp.arange(number), jnp.arange(ways, dtype=targets.dtype)
    losses = jax.vmap(jax.vmap(loss, (None, 0)), (0, None))(queries, classes)
    return jax.nn.softmax(-number * losses, axis=1)


def _key(number: int) -> Array:
    # the same for every run, so that runs are compared on the same episodes
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), TEST), number)

"""What a page says of one run: what its folder holds, and what its newest checkpoint can do."""

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
    """One test task and what the learner says of its query examples.

    Attributes:
        group: the name of the group its classes are from.
        task: the task, as NumPy arrays.
        before: [query, ways] probabilities before adaptation.
        after: the same after the inner loop.
    """

    group: str
    task: Task
    before: Float[np.ndarray, "query ways"]
    after: Float[np.ndarray, "query ways"]


@dataclass(frozen=True)
class Judged:
    """One run on the page.

    Attributes:
        name: of its folder, with its parent's where two folders have the same.
        config: its options.
        lines: its log points.
        final: its final report; None where it has not ended.
        step: of the checkpoint that was judged; None where there is none.
        groups: accuracy on test episodes of each group alone, by the group's name.
        episode: one test task; None where there is no checkpoint or the examples are no images.
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
) -> list[Judged]:
    """Read runs' folders and put the newest checkpoint of each to the test.

    Args:
        paths: of the runs' folders.
        episodes: test episodes of each group, at least 2.
        data_dir: the folder of the runs' data, where they are not part of the package.
        limits: what files of data may ask of the machine.

    Returns:
        For each run what `write` shows of it: `name` (of its folder, with its parent's where two
        folders have the same), `config`, its log points as `lines`, its report as `final` (None
        where it has not ended), the `step` of the checkpoint that was judged (None where there is
        none), the accuracy on test episodes of each of the `groups`, and as `episode` one test
        task with the learner's probabilities `before` and `after` adaptation. A run that goes on,
        or has no checkpoint yet, is shown as far as it is.

    Raises:
        UserError: one is no run's folder, or its data need `data_dir`.
        FileError: metrics or a report cannot be read.
        DataError: a run's data are missing or altered.
    """
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-2:]) for path in paths]
    pairs = zip(paths, names, strict=True)
    return [judge(path, name, episodes, data_dir, limits) for path, name in pairs]


def judge(
    path: Path,
    name: str,
    episodes: int,
    data_dir: Path | None = None,
    limits: Limits = Limits(),
) -> Judged:
    """One run of `judge_all`, under the name it has on the page."""
    folder = RunFolder(path)
    config = folder.config()
    known = partial(Judged, name, config, folder.metrics(), folder.final_report())
    if not checkpoints.whole(folder.checkpoints):
        return known(None, {}, None)
    require_unaltered(folder, config)
    trainer = make_trainer(confirmed(config, data_dir), limits=limits)
    state = checkpoints.restore(folder.checkpoints, trainer.init())
    test = trainer.splits["test"]
    dataset = test.to_device() if isinstance(test, HostDataset) else test
    learner = config.learner(dataset.example_shape, test=True)
    sampler = trainer.judged["any styles"]
    groups = by_group(learner, state.meta_params, dataset, sampler, episodes)
    episode = one_episode(learner, state.meta_params, dataset, sampler, config.ways)
    return known(int(state.step), groups, episode)


def only(dataset: Dataset, group: int) -> Dataset:
    """The classes of one group; the others stay, without examples, so that no shape changes."""
    return replace(dataset, count=jnp.where(dataset.group == group, dataset.count, 0))


def by_group(
    learner: Learner, meta_params: MetaParams, dataset: Dataset, sampler: Episodes, count: int
) -> dict[str, Interval]:
    """Accuracy on episodes of each group alone, for the groups that have enough classes."""

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
    """The first test task of the group with the most classes, before and after adaptation."""
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
    r"""What a learner says of each query example, by its outer loss alone.

    $$p_j(c) \propto \exp(-m f(y_1 \dots y_{j-1}, c, y_{j+1} \dots y_m))$$

    because f is the mean of the m cross-entropies −log p_j(y_j): changing one target changes one
    term. Only the targets differ, so the network still runs once.

    Args:
        learner: whose outer loss is a mean cross-entropy.
        meta_params: θ.
        task: one task.
        params: φ.
        ways: classes.

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
    # the same episodes for every run, so that runs can stand beside each other
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), TEST), number)

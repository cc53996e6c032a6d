"""Training with log points and checkpoints, and the final report."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memmeta.meta import MetaState, Metrics, explain
from memmeta.meta import _mesh as mesh_of
from memmeta.meta._explain import in_trouble
from memmeta.runs import checkpoints
from memmeta.runs._blocks import Block
from memmeta.runs._config import UserError
from memmeta.runs._folder import RunFolder
from memmeta.runs._interruption import Interrupted, Stopped, interruptible
from memmeta.runs._stored import require_unaltered
from memmeta.runs._trainer import TEST, VALIDATION, Trainer

VALIDATION_EPISODES = 100
log = logging.getLogger("memmeta")


def train(
    trainer: Trainer,
    block: Block,
    folder: RunFolder,
    resume: bool,
    show: Callable[[dict[str, Any]], None] = lambda line: None,
    strict: bool = False,
) -> MetaState:
    """Train to the last meta-step, with a log point after every block of meta-steps.

    A checkpoint is saved every `config.saved_every` meta-steps and at the end.

    Args:
        trainer: the run's trainer.
        block: the result of `trainer.compile()`.
        folder: the folder that metrics and checkpoints are written to.
        resume: continue from the newest checkpoint instead of starting anew.
        show: a function that is called with every log point.
        strict: stop at the first trouble that `memmeta.explain` would report.

    Returns:
        The state at the end.

    Raises:
        CheckpointError: no checkpoint can be used.
        UserError: the configuration was altered, the checkpoints are missing, or the folder was
            moved; no task of the last block was usable; SIGTERM or SIGINT came (the state is
            saved); or, with `strict`, there was trouble.
        OSError: the folder cannot be written; what was written before stays.
    """
    config, state, metrics = trainer.config, trainer.init(), None
    validation = trainer.usual
    if resume:
        state = _resumed(trainer, folder, state)
    with interruptible() as interrupted:
        while (step := int(state.step)) < config.meta_steps:
            count = min(config.log_every - step % config.log_every, config.meta_steps - step)
            before = jax.tree.map(jnp.copy, state) if strict else state
            began = time.perf_counter()
            state, metrics = block(state, trainer.splits["train"], count)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - began
            if strict and in_trouble(metrics):
                raise _stop(trainer, block, folder, before)
            step += count
            line = log_point(step, metrics, count * config.tasks / seconds)
            due = step == config.meta_steps or step % config.saved_every == 0
            if due:
                found = trainer.evaluator(
                    state, "validation", validation, VALIDATION_EPISODES, VALIDATION
                )
                line |= {"validation_accuracy": found.mean, "validation_interval": found.half_width}
            folder.append_metrics(line)
            show(line | ({"trouble": explain(metrics)} if in_trouble(metrics) else {}))
            stopping = interrupted()
            if due or stopping:
                _save(folder, trainer, step, state)
            if stopping and step < config.meta_steps:
                raise Interrupted(f"stopped by a signal after meta-step {step}, which is saved")
    if metrics is not None and not int(metrics.used):
        raise UserError(f"{folder.path}: the run ended in trouble: {explain(metrics)}")
    return state


def _save(folder: RunFolder, trainer: Trainer, step: int, state: MetaState) -> None:
    folder.require_here()
    note = {"config": trainer.config.plain()}
    checkpoints.save(folder.checkpoints, step, trainer.stored(state), note)


def _resumed(trainer: Trainer, folder: RunFolder, state: MetaState) -> MetaState:
    """Restore the newest checkpoint, and drop the metrics of later meta-steps."""
    config = trainer.config
    require_unaltered(folder, config)
    if checkpoints.whole(folder.checkpoints):
        known, state = trainer.restored(folder.checkpoints)
        if not jax.tree.all(jax.tree.map(np.array_equal, known.head, trainer.head)):
            raise UserError(
                f"{folder.path}: its checkpoints hold another random head than the trainer; "
                "compile the trainer that trainer.restored(folder.checkpoints) returns"
            )
    else:  # the run ended before its first checkpoint, or somebody removed the checkpoints
        last = max((line["step"] for line in folder.metrics()), default=0)
        if last > config.saved_every or folder.final_report() is not None:
            raise UserError(
                f"{folder.path}: its metrics go to meta-step {last}, but no checkpoint is there; "
                "put the folder checkpoints back, or start a new run"
            )
        if last:
            log.warning("%s: no checkpoint yet, so the run starts again", folder.path)
    folder.keep_metrics_until(int(state.step))
    checkpoints.set_aside(folder.checkpoints, int(state.step))
    return state


def _stop(trainer: Trainer, block: Block, folder: RunFolder, state: MetaState) -> Stopped:
    """Repeat a block one meta-step at a time, and save the state before the first trouble."""
    dataset = trainer.splits["train"]
    while True:
        before = jax.tree.map(jnp.copy, state)
        state, metrics = block(state, dataset, 1)
        if in_trouble(metrics):
            break
    step = int(before.step)
    _save(folder, trainer, step, before)
    gather = jax.jit(lambda tasks: tasks, out_shardings=trainer.everywhere)
    tasks = gather(trainer.batch(before, dataset))
    file = folder.save_batch(tasks)
    return Stopped(
        f"--strict: trouble in meta-step {step + 1}: {explain(metrics).rstrip('.')}; the state "
        f"before it is checkpoint {step}, its tasks are in {file}"
    )


def log_point(step: int, metrics: Metrics, tasks_per_second: float) -> dict[str, Any]:
    """The metrics of a block as a flat dict of plain numbers; counts are over the whole block."""
    report = {name: x for name, x in metrics.report._asdict().items() if x is not None}
    figures = {
        "loss": metrics.loss,
        **metrics.aux,
        **report,
        "gradient_norm": metrics.gradient_norm,
    }
    line: dict[str, Any] = {"step": step}
    line |= {name: float(value) for name, value in figures.items()}
    line |= {name: int(count) for name, count in metrics.counts.as_dict().items()}
    return line | {"tasks_per_second": tasks_per_second}


def final_report(
    trainer: Trainer,
    state: MetaState,
    folder: RunFolder,
    block: Block | None = None,
) -> dict[str, Any]:
    """Report the accuracy on held-out test episodes, the speed, and the memory.

    Args:
        trainer: the run's trainer.
        state: the state to evaluate.
        folder: the run folder, whose metrics contain the speed.
        block: the result of `trainer.compile()`, for the memory; None to leave the memory out.

    Returns:
        A dict that can be written as JSON.
    """
    config, evaluate = trainer.config, trainer.evaluator
    accuracy = {
        name: evaluate(state, "test", sampler, config.episodes, TEST)
        for name, sampler in trainer.judged.items()
    }
    lines = folder.metrics()
    speeds = [n for line in lines[1:] if (n := line.get("tasks_per_second")) is not None]
    memory = block.program.memory_analysis() if block else None
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
        "devices": mesh_of.shards(trainer.meta_step.mesh),
    }

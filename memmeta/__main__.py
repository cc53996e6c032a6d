"""The command line: `memmeta train`, `memmeta evaluate` and `memmeta report`.

Exit codes: 0 done; 1 something to mend, said in one line; 2 options that cannot be read; 3 a run
with --strict met trouble; 75 SIGTERM or SIGINT came and the state is saved, go on with --resume;
130 and 143 the same signals where there was nothing to save.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from memmeta.data import DataError
from memmeta.meta import _mesh as mesh_of
from memmeta.runs import _devices as devices
from memmeta.runs import _events as events
from memmeta.runs import _processes as processes
from memmeta.runs import checkpoints
from memmeta.runs._config import Config, UserError
from memmeta.runs._folder import RunFolder, new_run, old_run, unused_path
from memmeta.runs._interruption import Interrupted, Stopped
from memmeta.runs.checkpoints import CheckpointError, write_whole


@dataclass(frozen=True)
class Train:
    """Meta-train a method, report on held-out tasks.

    SIGTERM or SIGINT (Ctrl-C): the run finishes the meta-steps up to its next line of metrics,
    saves its state, and ends with exit code 75.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Path | None = None
    """Run folder; None makes a new one below runs/."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder, with the options it was made with."""
    strict: bool = False
    """Stop at the first task that is not finite, inner loop that diverges, inner Hessian that is
    not positive or meta-gradient that explodes, with the state and the tasks saved."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder too; needs tensorboardX."""
    devices: int | None = None
    """Devices of each process to spread tasks over; changes nothing but rounding. None: as many as
    there are and can share the tasks out evenly; of a CPU each core is one."""
    processes: int = 1
    """Processes of this machine's CPU to share the run, for a try of what a launcher does on many
    machines."""


@dataclass(frozen=True)
class Evaluate:
    """Judge a run's newest checkpoint on held-out test tasks."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    episodes: int | None = None
    """Test episodes; None: as in the run."""
    test_steps: int | None = None
    """Steps of the inner loop; None: as in the run."""


@dataclass(frozen=True)
class Report:
    """Write one HTML page, and its pictures as PNGs, that shows runs side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, at least one."""
    out: Path = Path("report.html")
    """The page; the PNGs go into a folder of its name without the suffix."""
    episodes: int = 100
    """Test episodes of each group of classes."""


def run_train(command: Train) -> None:
    """`memmeta train`."""
    from memmeta.runs import _progress as progress

    config = command.config
    devices.use(command.devices or (None if processes.launched() else devices.cores()))
    if processes.launched():
        processes.join()
    progress.console.quiet = not processes.is_first()
    if command.run is None and jax.process_count() > 1:
        raise UserError("run: several processes need one folder, named by --run")
    if command.resume and command.run is not None:
        holder = old_run(command.run)
    else:
        holder = new_run(command.run or _new_path(config), config)
    with holder as folder:
        progress.console.print(f"run folder: {folder.path}", soft_wrap=True)
        _train_in(folder, command)


def _new_path(config: Config) -> Path:
    return unused_path(Path("runs"), f"{config.data}-{config.method}")


def _train_in(folder: RunFolder, command: Train) -> None:
    from memmeta.runs import _picture as picture
    from memmeta.runs import _progress as progress
    from memmeta.runs._train import final_report, train
    from memmeta.runs._trainer import check_room, make_trainer

    config = command.config
    mesh = devices.chosen(command.devices, config.tasks)
    trainer = make_trainer(config, mesh)
    progress.console.print(
        f"{config.method} on {config.data}, {config.ways}-way {config.shots}-shot, "
        f"on {mesh_of.shards(mesh)} {jax.default_backend()} device(s); compiling the meta-step",
        soft_wrap=True,
    )
    block = trainer.compile()
    check_room(trainer, block)
    with ExitStack() as shown:
        shows = [shown.enter_context(progress.shown(config.meta_steps))]
        if command.tensorboard:
            shows.append(shown.enter_context(events.written(folder.path)))

        def show(line: dict[str, Any]) -> None:
            for each in shows:
                each(line)

        state = train(trainer, block, folder, command.resume, show, command.strict)
    report = final_report(trainer, state, folder, block)
    if not processes.is_first():
        return
    picture.learning_curve(folder.metrics(), folder.path / "learning_curve.png")
    write_whole(folder.path / "report.json", json.dumps(report, indent=2) + "\n")
    progress.print_report(report)


def run_evaluate(command: Evaluate) -> None:
    """`memmeta evaluate`."""
    from memmeta.runs import _progress as progress
    from memmeta.runs._train import final_report
    from memmeta.runs._trainer import make_trainer

    folder = RunFolder(command.run)
    given = {"episodes": command.episodes, "test_steps": command.test_steps}
    changes: dict[str, Any] = {name: n for name, n in given.items() if n is not None}
    config = replace(folder.config(), **changes)
    devices.use(devices.cores())
    trainer = make_trainer(config, devices.chosen(None, config.tasks))
    state = checkpoints.restore(folder.checkpoints, trainer.init())
    progress.print_report(final_report(trainer, state, folder))


def run_report(command: Report) -> None:
    """`memmeta report`."""
    from memmeta.runs import report

    if not command.runs:
        raise UserError("runs: found none, expected at least one run folder")
    if command.episodes < 2:
        raise UserError(f"episodes: expected at least 2, found {command.episodes}")
    runs = report.judge_all(command.runs, command.episodes)
    for path in report.write(runs, command.out, command.episodes):
        print(path)


def _stored_default(arguments: Sequence[str]) -> Config:
    """With --resume, the options the run was made with are the defaults."""
    if "--resume" in arguments and "--run" in arguments[:-1]:
        return RunFolder(Path(arguments[arguments.index("--run") + 1])).config()
    return Config()


def _refuse_changes(stored: Config, given: Config) -> None:
    changed = [n for n in vars(stored) if getattr(stored, n) != getattr(given, n)]
    if changed:
        name = changed[0]
        raise UserError(
            f"{name}: was {getattr(stored, name)} in this run, found {getattr(given, name)}; "
            "a resumed run keeps its options: leave it out, or start a new run"
        )


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place for them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        folder = Path(root).expanduser() / "memmeta" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default those of the process.

    Returns:
        The exit code, see the top of this module.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # orbax reports every save and restore; a person wants to hear of failures only
    logging.getLogger("absl").setLevel(logging.ERROR)
    use_compilation_cache()
    try:
        return _run(arguments)
    except Interrupted as error:
        print(f"memmeta: {error}; go on with --resume", file=sys.stderr)
        return 75
    except Stopped as error:
        print(f"memmeta: {error}", file=sys.stderr)
        return 3
    except (UserError, DataError, CheckpointError, OSError, ValueError) as error:
        print(f"memmeta: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("memmeta: interrupted; go on with --resume", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    stored = _stored_default(arguments)
    train = Annotated[Train, tyro.conf.subcommand("train", default=Train(stored))]
    evaluate = Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    report = Annotated[Report, tyro.conf.subcommand("report")]
    command: Train | Evaluate | Report = tyro.cli(
        train | evaluate | report,
        prog="memmeta",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    if isinstance(command, Evaluate):
        run_evaluate(command)
        return 0
    if isinstance(command, Report):
        run_report(command)
        return 0
    if command.resume and command.run is None:
        raise UserError("--resume: name the run folder to go on with, by --run")
    if command.resume:
        _refuse_changes(stored, command.config)
    if command.tensorboard:
        events.require()
    for name in ("processes", "devices"):
        if getattr(command, name) is not None and getattr(command, name) < 1:
            raise UserError(f"{name}: expected at least 1, found {getattr(command, name)}")
    if command.processes > 1 and not processes.launched():
        folder = [] if command.run else ["--run", str(_new_path(command.config))]
        return processes.launch(command.processes, [*arguments, *folder])
    run_train(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `memmeta train`, `evaluate`, `compare` and `report`; `memmeta --version`.

Exit codes:

0           success
1           an error that the user can correct, explained in one line
2           wrong options
3           a run with --strict met trouble
75          SIGTERM or SIGINT came and the state was saved; continue with --resume
130, 143    SIGINT or SIGTERM came and there was nothing to save
"""

import inspect
import io
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import jax
import tyro

import memmeta
from memmeta import algorithms
from memmeta.data import DataError, Limits
from memmeta.data._files import unused_path
from memmeta.meta import _mesh as mesh_of
from memmeta.runs import _devices as devices
from memmeta.runs import _events as events
from memmeta.runs import _methods as methods
from memmeta.runs import _processes as processes
from memmeta.runs import checkpoints
from memmeta.runs._blocks import Block
from memmeta.runs._compiled import use_compilation_cache
from memmeta.runs._config import Config, UserError
from memmeta.runs._folder import RunFolder, new_run, old_run, require_new
from memmeta.runs._interruption import Interrupted, Stopped
from memmeta.runs._networks import is_module
from memmeta.runs._options import InOptions, in_options
from memmeta.runs._stored import confirmed, require_unaltered
from memmeta.runs._trainer import Trainer, check_room, make_trainer
from memmeta.runs.checkpoints import CheckpointError

log = logging.getLogger("memmeta")
MAY_CHANGE = ("episodes", "test_steps", "image_size", "channels")  # in an evaluation


@dataclass(frozen=True)
class Train:
    """Meta-train a method and report its accuracy on held-out tasks.

    After SIGTERM or SIGINT (Ctrl-C) the run finishes the meta-steps up to its next line of metrics,
    saves its state, and ends with exit code 75.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Path | None = None
    """Run folder; None makes a new one below runs/."""
    resume: bool = False
    """Continue from the newest checkpoint of the run folder with the run's own options. Only
    META_STEPS may be larger, which lengthens the run, and DATA_DIR must be given again if the data
    need one."""
    strict: bool = False
    """Stop at the first trouble, such as a task that is not finite, an inner loop that diverges or
    a meta-gradient that explodes, and save the state and the tasks."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder too; needs tensorboardX."""
    devices: int | None = None
    """Devices of each process to spread tasks over, which changes results only by rounding. None:
    the largest number that divides TASKS, where a CPU has one device per core; in a run of several
    processes, all devices."""
    processes: int = 1
    """Number of processes on this machine's CPU to run in, to try out a run of several machines."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's newest checkpoint on held-out test tasks."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    episodes: int | None = None
    """Number of test episodes; None: as in the run."""
    test_steps: int | None = None
    """Steps of the inner loop; None: as in the run."""
    data: str | None = None
    """Other data to evaluate on; None: the run's."""
    image_size: int | None = None
    """Side in pixels that images are resized to; None: as in the run."""
    channels: Literal[1, 3] | None = None
    """1 for grey images, 3 for colour; None: as in the run."""
    data_dir: Path | None = None
    """Folder of the data, needed if these are not part of the package: the folder that the run's
    configuration names, or another."""
    network: str | None = None
    """The run's network, to confirm that its code may be run, if it is one of your own
    (module:PATH.TO:FACTORY)."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Compare:
    """Compare runs on the same test episodes: accuracies, and their paired difference from the
    first run's, with 95 % intervals."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, at least two, with the same data, ways, shots and test queries."""
    episodes: int = 600
    """Number of test episodes."""
    data_dir: Path | None = None
    """Folder of the runs' data, as for `memmeta evaluate`."""
    network: str | None = None
    """The runs' network, as for `memmeta evaluate`."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Report:
    """Write an HTML page that shows runs side by side, and its charts as PNGs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, at least one."""
    out: Path = Path("report.html")
    """The page; the PNGs go into a folder with the same name but no suffix."""
    episodes: int = 100
    """Number of test episodes of each group of classes."""
    data_dir: Path | None = None
    """Folder of the runs' data, as for `memmeta evaluate`."""
    network: str | None = None
    """The runs' network, as for `memmeta evaluate`."""
    limits: Limits = field(default_factory=Limits)


def run_train(command: Train) -> None:
    """Run the command `memmeta train`."""
    from memmeta.runs import _progress as progress

    devices.use(command.devices or (None if processes.launched() else devices.cores()))
    if processes.launched():
        processes.join()
    progress.console.quiet = not processes.is_first()
    if command.run is None and jax.process_count() > 1:
        raise UserError("run: several processes need one folder, named by --run")
    path = command.run or _new_path(command.config)
    if command.resume:
        with old_run(path) as folder:
            trainer, block = _prepared(command, folder)
            _train_in(folder, command, trainer, block)
        return
    if processes.is_first():
        require_new(path)
    # prepared before the folder is made, so that a run that cannot start leaves no folder behind
    trainer, block = _prepared(command)
    with new_run(path, command.config) as folder:
        _train_in(folder, command, trainer, block)


def _new_path(config: Config) -> Path:
    return unused_path(Path("runs"), f"{config.data}-{config.method}".replace("/", "-"))


def _prepared(command: Train, resumed: RunFolder | None = None) -> tuple[Trainer, Block]:
    from memmeta.runs import _progress as progress

    config = command.config
    mesh = devices.chosen(command.devices, config.tasks)
    trainer = make_trainer(config, mesh, command.limits, progress.data_bar)
    if trainer.head is not None and resumed and checkpoints.whole(resumed.checkpoints):
        require_unaltered(resumed, config)
        trainer, _ = trainer.restored(resumed.checkpoints)  # its head, before it is compiled
    progress.console.print(
        f"{config.method} on {config.data}, {config.ways}-way {config.shots}-shot, "
        f"on {mesh_of.shards(mesh)} {jax.default_backend()} device(s); compiling the meta-step",
        soft_wrap=True,
    )
    block = trainer.compile()
    check_room(trainer, block)
    return trainer, block


def _train_in(folder: RunFolder, command: Train, trainer: Trainer, block: Block) -> None:
    from memmeta.runs import _picture as picture
    from memmeta.runs import _progress as progress
    from memmeta.runs._train import final_report, train

    config = command.config
    progress.console.print(f"run folder: {folder.path}", soft_wrap=True)
    if command.resume and config.meta_steps > (stored := folder.config()).meta_steps:
        folder.write_config(replace(stored, meta_steps=config.meta_steps))
        progress.console.print(
            f"lengthened from {stored.meta_steps} to {config.meta_steps} meta-steps: from here on "
            "the rate follows the cosine of the new length",
            soft_wrap=True,
        )
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
    folder.write("learning_curve.png", picture.learning_curve(folder.metrics()))
    folder.write("report.json", json.dumps(report, indent=2) + "\n")
    progress.print_report(report)


def run_evaluate(command: Evaluate) -> None:
    """Run the command `memmeta evaluate`."""
    from memmeta.runs import _progress as progress
    from memmeta.runs._train import final_report

    folder = RunFolder(command.run)
    given = {name: getattr(command, name) for name in MAY_CHANGE}
    changes: dict[str, Any] = {name: n for name, n in given.items() if n is not None}
    stored = folder.config()
    require_unaltered(folder, stored)
    named = (command.data_dir, command.network, command.data)
    config = confirmed(replace(stored, **changes), *named)
    devices.use(devices.cores())
    mesh = devices.chosen(None, config.tasks)
    made = make_trainer(config, mesh, command.limits, progress.data_bar)
    try:
        trainer, state = made.restored(folder.checkpoints)
    except CheckpointError as error:
        if command.data is None:
            raise
        shape = "x".join(map(str, made.splits["test"].example_shape))
        raise UserError(
            f"data: {command.data} has examples of {shape}, which the run's network does not fit "
            f"({error}); --image-size and --channels give them the shape of those it was trained on"
        ) from error
    progress.print_report(final_report(trainer, state, folder))


def run_compare(command: Compare) -> None:
    """Run the command `memmeta compare`."""
    from memmeta.runs import _progress as progress
    from memmeta.runs._compare import compare

    devices.use(devices.cores())
    rows = compare(
        command.runs, command.episodes, command.data_dir, command.network, command.limits
    )
    progress.print_comparison(rows)


def run_report(command: Report) -> None:
    """Run the command `memmeta report`."""
    from memmeta.runs import report

    if not command.runs:
        raise UserError("runs: found none, expected at least one run folder")
    if command.episodes < 2:
        raise UserError(f"episodes: expected at least 2, found {command.episodes}")
    how = (command.episodes, command.data_dir, command.limits, command.network)
    runs = report.judge_all(command.runs, *how)
    for path in report.write(runs, command.out, command.episodes):
        print(path)


def _given(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option among arguments that are not parsed yet."""
    found = None
    for given, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if given == option:
            found = following
        elif given.startswith(f"{option}="):
            found = given.removeprefix(f"{option}=")
    return found


def _stored_default(arguments: Sequence[str]) -> Config:
    """The default options: with --resume those of the run, except for the folder of its data.

    The run folder may come from somebody else, so only the user may name a folder of data to read.
    """
    path = _given(arguments, "--run")
    if "--resume" in arguments and path is not None:
        stored = RunFolder(Path(path)).config()
        network = Config().network if is_module(stored.network) else stored.network
        return replace(stored, data_dir=None, network=network)
    return Config()


def _confirmed(run: Path, given: Config) -> Config:
    """The options of a run to resume: its own, with the user's data folder and `meta_steps`.

    Raises:
        UserError: an option differs from the run's, or a data folder is needed and was not given.
    """
    stored = RunFolder(run).config()
    code = {"network"} if is_module(stored.network) else set()  # `confirmed` asks for it
    for name in vars(stored).keys() - {"data_dir"} - code:
        was, found = getattr(stored, name), getattr(given, name)
        if was != found and not (name == "meta_steps" and found > was):
            longer = "or a larger one, " if name == "meta_steps" else ""
            raise UserError(
                f"{name}: was {was} in this run, found {found}; a resumed run keeps its options: "
                f"leave it out, {longer}or start a new run"
            )
    named = (given.data_dir, given.network)
    return replace(confirmed(stored, *named), meta_steps=given.meta_steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments without the program's name; None: those of this process.

    Returns:
        The exit code, see the docstring of this module.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # orbax logs every save and restore, but the user needs to see failures only
    logging.getLogger("absl").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may not be valid Unicode
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(InOptions(*_options()))
    log.addHandler(handler)
    # Pillow's own warning of large images, which --most-pixels decides on
    warnings.filterwarnings("ignore", message=".*decompression bomb")
    log.propagate = False  # else handlers that libraries add to the root logger repeat it
    try:
        use_compilation_cache()
        return _run(arguments)
    except Interrupted as error:
        print(f"memmeta: {error}; go on with --resume", file=sys.stderr)
        return 75
    except Stopped as error:
        print(f"memmeta: {error}", file=sys.stderr)
        return 3
    except (UserError, DataError, CheckpointError, OSError, ValueError) as error:
        said = in_options(" ".join(str(error).split()), *_options())
        print(f"memmeta: {said}", file=sys.stderr)
        return 1
    except (MemoryError, OverflowError, jax.errors.JaxRuntimeError) as error:
        first = (str(error).strip().splitlines() or ["no memory left"])[0]
        print(f"memmeta: more than this machine can do: {first}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("memmeta: interrupted; go on with --resume", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)
        log.propagate = True


def _options() -> tuple[list[str], list[str]]:
    """The names of all options, and of those that are given without a value."""
    kinds = {
        name: kind
        for part in (Config, Train, Evaluate, Compare, Report, Limits)
        for name, kind in get_type_hints(part).items()
    }
    names = [name for name in kinds if name not in ("config", "limits", "runs")]
    return names, [name for name in names if kinds[name] is bool]


def _described(arguments: Sequence[str]) -> str:
    """The help of `memmeta train`, with what the method that is named has of its own."""
    found = _given(arguments, "--method") or Config().method
    text = inspect.getdoc(Train) or ""
    if found not in algorithms.METHODS:
        return text
    return (
        f"{text}\n\n{methods.described(found)}\n\n`--method X --help` says this of another method."
    )


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"memmeta {memmeta.__version__}")
        return 0
    stored = _stored_default(arguments)
    described = _described(arguments)
    train = Annotated[
        Train, tyro.conf.subcommand("train", default=Train(stored), description=described)
    ]
    evaluate = Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    report = Annotated[Report, tyro.conf.subcommand("report")]
    compare = Annotated[Compare, tyro.conf.subcommand("compare")]
    command: Train | Evaluate | Report | Compare = tyro.cli(
        train | evaluate | compare | report,
        prog="memmeta",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    if isinstance(command, Evaluate):
        run_evaluate(command)
        return 0
    if isinstance(command, Compare):
        run_compare(command)
        return 0
    if isinstance(command, Report):
        run_report(command)
        return 0
    if command.resume and command.run is None:
        raise UserError("--resume: name the run folder to go on with, by --run")
    if command.resume and command.run is not None:
        command = replace(command, config=_confirmed(command.run, command.config))
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

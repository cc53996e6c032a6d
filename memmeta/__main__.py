"""The command line: `memmeta train` and `memmeta evaluate`."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import tyro

from memmeta import checkpoints
from memmeta.checkpoints import CheckpointError, write_whole
from memmeta.config import Config, UserError
from memmeta.data import DataError
from memmeta.run_folder import RunFolder, new_run, old_run, unused_path


@dataclass(frozen=True)
class Train:
    """Meta-train a method, report on held-out tasks."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Path | None = None
    """Run folder; None makes a new one below runs/."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder, with the options it was made with."""


@dataclass(frozen=True)
class Evaluate:
    """Judge a run's newest checkpoint on held-out test tasks."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    episodes: int | None = None
    """Test episodes; None: as in the run."""
    test_steps: int | None = None
    """Steps of the inner loop; None: as in the run."""


def run_train(command: Train) -> None:
    """`memmeta train`."""
    from memmeta import progress

    config = command.config
    if command.resume:
        holder = old_run(command.run)
    else:
        path = command.run or unused_path(Path("runs"), f"{config.data}-{config.method}")
        holder = new_run(path, config)
    with holder as folder:
        progress.console.print(f"run folder: {folder.path}", soft_wrap=True)
        _train_in(folder, config, command.resume)


def _train_in(folder: RunFolder, config: Config, resume: bool) -> None:
    from memmeta import picture, progress
    from memmeta.train import final_report, make_trainer, train

    trainer = make_trainer(config)
    progress.console.print(
        f"{config.method} on {config.data}, {config.ways}-way {config.shots}-shot, "
        f"on {jax.device_count()} {jax.default_backend()} device(s); compiling the meta-step",
        soft_wrap=True,
    )
    block = trainer.compile()
    with progress.shown(config.meta_steps) as show:
        state = train(trainer, block, folder, resume, show)
    picture.learning_curve(folder.metrics(), folder.path / "learning_curve.png")
    report = final_report(trainer, block, state, folder)
    write_whole(folder.path / "report.json", json.dumps(report, indent=2) + "\n")
    progress.print_report(report)


def run_evaluate(command: Evaluate) -> None:
    """`memmeta evaluate`."""
    from memmeta import progress
    from memmeta.train import final_report, make_trainer

    folder = RunFolder(command.run)
    changes = {"episodes": command.episodes, "test_steps": command.test_steps}
    changes = {name: value for name, value in changes.items() if value is not None}
    trainer = make_trainer(replace(folder.config(), **changes))
    state = checkpoints.restore(folder.checkpoints, trainer.init())
    progress.print_report(final_report(trainer, trainer.compile(), state, folder))


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
        The exit code: 0 done, 1 something the user can mend (said in one line), 130 interrupted.
        Options that cannot be read end in exit code 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # orbax reports every save and restore; a person wants to hear of failures only
    logging.getLogger("absl").setLevel(logging.ERROR)
    use_compilation_cache()
    try:
        _run(arguments)
    except (UserError, DataError, CheckpointError, OSError, ValueError) as error:
        print(f"memmeta: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("memmeta: interrupted; go on with --resume", file=sys.stderr)
        return 130
    return 0


def _run(arguments: list[str]) -> None:
    stored = _stored_default(arguments)
    train = Annotated[Train, tyro.conf.subcommand("train", default=Train(stored))]
    evaluate = Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    command: Train | Evaluate = tyro.cli(
        train | evaluate,  # type: ignore[arg-type]
        prog="memmeta",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    if isinstance(command, Evaluate):
        run_evaluate(command)
    else:
        if command.resume and command.run is None:
            raise UserError("--resume: name the run folder to go on with, by --run")
        if command.resume:
            _refuse_changes(stored, command.config)
        run_train(command)


if __name__ == "__main__":
    sys.exit(main())

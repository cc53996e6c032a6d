"""Configurations that were read from a file, which may be a stranger's."""

from dataclasses import replace
from pathlib import Path

from memmeta.data._registry import touches_files
from memmeta.runs import checkpoints
from memmeta.runs._config import Config, UserError
from memmeta.runs._folder import RunFolder

MAY_DIFFER = {"data_dir", "episodes", "test_steps", "meta_steps"}
"""Options that make no other run of the meta-steps made so far."""


def confirmed(config: Config, data_dir: Path | None) -> Config:
    """A stored configuration, once a person has named the folder of its data.

    Args:
        config: as it was read.
        data_dir: what the person named; None: nothing.

    Returns:
        The configuration with that folder.

    Raises:
        UserError: loading the data would read, make or download files, and nothing was named.
    """
    if data_dir is not None:
        return replace(config, data_dir=data_dir)
    if touches_files(config.data, config.data_dir):
        named = "" if config.data_dir is None else f" in {config.data_dir}"
        raise UserError(
            f"data_dir: the configuration wants to use the data set {config.data}{named}, where "
            "files may be read, unpacked, downloaded and converted; say --data-dir FOLDER to "
            "confirm that folder or to name yours"
        )
    return config


def require_unaltered(folder: RunFolder, config: Config) -> None:
    """Refuse a configuration that is not the one that the newest checkpoint was made with.

    Args:
        folder: of the run.
        config: as it was read from there.

    Raises:
        UserError: it was altered since; the message names the option.
    """
    steps = checkpoints.whole(folder.checkpoints)
    was = checkpoints.note(folder.checkpoints, steps[0]).get("config") if steps else None
    if not isinstance(was, dict):
        return
    now = config.plain()
    for name in now.keys() - MAY_DIFFER:
        if was.get(name) != now[name]:
            raise UserError(
                f"{folder.config_file}: {name} is {now[name]}, but the newest checkpoint was made "
                f"with {was.get(name)}: put it back, or start a new run"
            )

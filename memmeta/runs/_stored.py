"""Checks of configurations that were read from a file, which may come from somebody else."""

from dataclasses import replace
from pathlib import Path

from memmeta.data._registry import touches_files
from memmeta.runs import checkpoints
from memmeta.runs._config import Config, UserError
from memmeta.runs._folder import RunFolder
from memmeta.runs._networks import is_module

MAY_DIFFER = {"data_dir", "episodes", "test_steps", "meta_steps"}
"""Options that may change after a checkpoint, as they do not affect the meta-steps before it."""


def confirmed(
    config: Config, data_dir: Path | None, network: str | None = None, data: str | None = None
) -> Config:
    """Set a stored configuration's data and network of one's own to those the user named.

    Args:
        config: the configuration as it was read.
        data_dir: the folder that the user named; None if the user named none.
        network: the network that the user named; None if the user named none.
        data: other data that the user named; None for the run's.

    Returns:
        The configuration with that folder and data.

    Raises:
        UserError: loading the data would read, make or download files, and the user named no
            folder; or the network is code, and the user did not name it.
    """
    code = is_module(config.network) and network != config.network
    config = config if data is None else replace(config, data=data, data_dir=None)
    reads = data_dir is None and touches_files(config.data, config.data_dir, config.reading())
    if code:
        folder = f" --data-dir {config.data_dir or 'FOLDER'}" if reads else ""
        raise UserError(
            f"network: the configuration wants to run code, the network {config.network}; say "
            f"--network {config.network}{folder} to confirm that it is yours"
        )
    if data_dir is not None:
        return replace(config, data_dir=data_dir)
    if reads:
        named = "" if config.data_dir is None else f" in {config.data_dir}"
        raise UserError(
            f"data_dir: the configuration wants to use the data set {config.data}{named}, where "
            "files may be read, unpacked, downloaded and converted; say --data-dir FOLDER to "
            "confirm that folder or to name yours"
        )
    return config


def require_unaltered(folder: RunFolder, config: Config) -> None:
    """Check that a configuration is the one that the newest checkpoint was made with.

    Args:
        folder: the run folder.
        config: the configuration as it was read from there.

    Raises:
        UserError: an option was changed since; the message names it.
    """
    steps = checkpoints.whole(folder.checkpoints)
    was = checkpoints.note(folder.checkpoints, steps[0]).get("config") if steps else None
    if not isinstance(was, dict):
        return
    now, defaults = config.plain(), Config().plain()
    for name in now.keys() - MAY_DIFFER:
        # an option that is younger than the run had its default
        if was.get(name, defaults[name]) != now[name]:
            raise UserError(
                f"{folder.config_file}: {name} is {now[name]}, but the newest checkpoint was made "
                f"with {was.get(name)}: put it back, or start a new run"
            )

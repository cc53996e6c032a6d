"""The cache that keeps compiled programs between runs."""

import logging
import os
from pathlib import Path

import jax

from memmeta.data._files import FileError, distrust, user_cache

log = logging.getLogger("memmeta")


def use_compilation_cache() -> None:
    """Keep compiled programs between runs in a folder that only the user can write to.

    Programs in the cache are executed without a check, so one that others can write to is not used.
    The user chooses the folder by `JAX_COMPILATION_CACHE_DIR`; the default one is not used if it is
    below the current directory, unless the home folder is too.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen and "://" in chosen:
        return  # a bucket, whose owner says who may write to it
    try:
        folder = Path(chosen) if chosen else user_cache() / "compiled"
        here = Path.cwd().resolve()
        below = folder.resolve().is_relative_to(here) and not Path.home().is_relative_to(here)
        if below and not chosen:  # a downloaded folder may contain a forged cache
            raise FileError(f"{folder} is below the current directory")
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        reason = distrust(folder)
    except (OSError, RuntimeError) as error:
        folder, reason = Path(), str(error)
    if reason is not None:
        log.warning("compiled programs are not kept between runs: %s", reason)
    jax.config.update("jax_compilation_cache_dir", None if reason else str(folder))

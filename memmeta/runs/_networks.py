"""Networks of the command line by name, one of the user's own included."""

import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from memmeta import models
from memmeta.models import Network

MODULE = "module:"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def is_module(name: str) -> bool:
    """Whether a name stands for code of the user's own, which building the network runs."""
    return name.startswith(MODULE)


def network(
    name: str,
    ways: int,
    image_shape: tuple[int, int, int],
    *,
    width: int,
    round_up: bool,
    dtype: str,
) -> Network:
    """The network of a name.

    Args:
        name: "conv4", "resnet12", "mlp", or "module:PATH.TO:FACTORY", a function of (ways,
            image_shape) that returns a `Network`.
        ways: outputs.
        image_shape: height, width and channels.
        width: filters of a block of conv4, a quarter of those of the last of resnet12; units of
            both layers of mlp.
        round_up: how conv4 pools odd sides.
        dtype: what features are computed in, "float32" or "bfloat16".

    Raises:
        ValueError: there is no network of that name, or its factory does not make one.
    """
    if name in ("conv4", "resnet12", "mlp"):
        try:
            made = _ours(name, ways, image_shape, width, round_up, dtype)
        except ValueError as error:
            raise ValueError(str(error).replace("image_shape", "image_size")) from error
    elif is_module(name):
        factory = _factory(name)
        try:
            found = factory(ways, image_shape)
        except Exception as error:
            raise ValueError(
                f"--network {name}: called with (ways, image_shape): {_in_one_line(error)}"
            ) from error
        if not isinstance(found, Network):
            raise ValueError(
                f"--network {name}: returned {type(found).__name__}, expected a "
                "memmeta.models.Network, such as memmeta.models.from_linen makes"
            )
        made = found
    else:
        raise ValueError(
            f"--network {name}: expected conv4, resnet12, mlp or module:PATH.TO:FACTORY"
        )
    return made


def _ours(
    name: str,
    ways: int,
    image_shape: tuple[int, int, int],
    width: int,
    round_up: bool,
    dtype: str,
) -> Network:
    options: Any = {"image_shape": image_shape, "head_scale": 1.0, "dtype": DTYPES[dtype]}
    if name == "conv4":
        return models.conv4(ways, width=width, round_up=round_up, **options)
    if name == "resnet12":
        return models.resnet12(ways, widths=(width, 2 * width, 3 * width, 4 * width), **options)
    del options["image_shape"]
    return models.mlp(ways, (width, width), image_shape, **options)


def _factory(name: str) -> Callable[[int, tuple[int, int, int]], object]:
    path, _, attribute = name.removeprefix(MODULE).partition(":")
    if "" not in sys.path:
        sys.path.append("")  # the current folder, which Python leaves out for an installed command
    try:
        found: object = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--network {name}: {error}; expected module:PATH.TO:FACTORY, where `import PATH.TO` "
            "works and FACTORY is a function of it"
        ) from error
    except Exception as error:
        raise ValueError(f"--network {name}: `import {path}`: {_in_one_line(error)}") from error
    if not callable(found):
        raise ValueError(f"--network {name}: {attribute} is no function")
    return found


def _in_one_line(error: Exception) -> str:
    """What went wrong in the user's code, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said} ({frame.filename}, line {frame.lineno})"

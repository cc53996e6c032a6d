"""Methods of the command line by name, with the options that are their own."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import optax

from memmeta import algorithms
from memmeta._shared import checks
from memmeta.few_shot.algorithms import Learner
from memmeta.inner import InnerLoop
from memmeta.models import Network

PARTS = ("head", "body", "all")
LOOP = ("inner_steps", "inner_rate")
OWN = ("ridge", "proximal", "cg_steps", "terms", "directions", "first_rate", "recompute_features")
"""Options that have the name and the meaning of an argument of the methods that have one."""


def options_of(method: str) -> dict[str, Any]:
    """The options that a method has besides those of all methods, with the method's own defaults.

    Example:
        >>> options_of("stocbio")
        {'inner_steps': 20, 'inner_rate': None, 'ridge': 0.1, 'terms': 20, 'head_start': 'zeros'}
    """
    known = inspect.signature(algorithms.METHODS[method]).parameters
    found: dict[str, Any] = {}
    if "inner" in known:
        found = {"inner_steps": known["inner"].default.steps, "inner_rate": None}
    found |= {name: known[name].default for name in OWN if name in known}
    if "adapts" in known:
        found["adapts"] = known["adapts"].default
    if "start" in known:
        found["head_start"] = "zeros"
    return found


def described(method: str) -> str:
    """What a method is and which options are its own, for the help of the command line.

    Example:
        >>> print(described("protonet"))
        protonet: Prototypical networks: a query image belongs to the nearest class mean.
        It has no options besides those of all methods.
    """
    first = (inspect.getdoc(algorithms.METHODS[method]) or "").splitlines()[0]
    own = options_of(method)
    shown = [
        _flag(name) + ("" if default is None else f" {default}") for name, default in own.items()
    ]
    said = (
        f"Its own options and their defaults: {', '.join(shown)}."
        if shown
        else "It has no options besides those of all methods."
    )
    return f"{method}: {first}\n{said}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def learner(
    method: str,
    network: Network,
    given: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Learner:
    """Make the learner of a method.

    Args:
        method: its name in `memmeta.algorithms.METHODS`.
        network: the network.
        given: the options that were given, of those that only some methods have.
        arguments: arguments that all methods have, and `start` of those with a fixed head.

    Returns:
        The learner.

    Raises:
        ValueError: the method has no such option, or a value does not fit.
    """
    own = options_of(method)
    for name, value in given.items():
        remedy = f"Its own options: {', '.join(map(_flag, own)) or 'none'}."
        expected = f"no value, as {method} has no such option"
        checks.require(name, value, name in own, expected, remedy)
    made: Callable[..., Learner] = algorithms.METHODS[method]
    options = {name: value for name, value in given.items() if name in OWN}
    if "adapts" in given:
        options["adapts"] = _adapts(given["adapts"])
    if "inner_steps" in own:
        default: InnerLoop = inspect.signature(made).parameters["inner"].default
        rate = given.get("inner_rate")
        solver = default.solver if rate is None else optax.sgd(rate)
        options["inner"] = InnerLoop(solver, given.get("inner_steps", default.steps))
    return made(network, **options, **arguments)


def _adapts(text: str) -> str | Callable[[str], bool]:
    if text in PARTS:
        return text
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(
            f"adapts: expected head, body, all or a regular expression, found {text!r} ({error})"
        ) from error
    return lambda path: pattern.search(path) is not None

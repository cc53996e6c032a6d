"""Checks of arguments, whose errors say which one, what was found and what was expected."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any


def require(name: str, found: Any, holds: bool, expected: str, remedy: str = "") -> None:
    """Raise unless a condition on an argument holds.

    Raises:
        ValueError: it does not; the remedy is one sentence or none.

    Example:
        >>> require("steps", -1, False, "a whole number, 0 or more")
        Traceback (most recent call last):
        ValueError: steps: expected a whole number, 0 or more, found -1.
    """
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {found!r}. {remedy}".rstrip())


def count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number, is less than `least`, or does not fit an int32."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    fits = whole and least <= int(value) < 2**31
    require(name, value, fits, f"a whole number, {least} or more, below 2³¹")


def positive(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0."""
    require(name, value, _finite(value) and value > 0, "a finite number above 0")


def not_negative(name: str, value: Any) -> None:
    """Refuse what is no finite number, 0 or more."""
    require(name, value, _finite(value) and value >= 0, "a finite number, 0 or more")


def probability(name: str, value: Any) -> None:
    """Refuse what is no number between 0 and 1, the ends excluded."""
    require(name, value, _finite(value) and 0 < value < 1, "a probability above 0 and below 1")


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def arguments(name: str, function: Callable[..., Any], number: int) -> None:
    """Refuse a function that cannot be called with so many positional arguments."""
    signature = inspect.signature(function)
    try:
        signature.bind(*range(number))
    except TypeError:
        expected = f"a function of {number} arguments"
        remedy = "See memmeta.inner.InnerSolver for what they are."
        require(name, f"{getattr(function, '__name__', 'one')}{signature}", False, expected, remedy)


def one_of(name: str, value: Any, options: tuple[Any, ...]) -> None:
    """Refuse what is not in a list."""
    require(name, value, value in options, f"one of {', '.join(map(repr, options))}")


def meant(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is most like another one; "" where none is.

    Example:
        >>> meant("mamll", ["maml", "anil"])
        " Did you mean 'maml'?"
    """
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def no_attribute(module: str, name: str, known: Iterable[str]) -> AttributeError:
    """The error of a name that a module does not have."""
    said = f"module {module!r} has no attribute {name!r}.{meant(name, known)}"
    return AttributeError(said)

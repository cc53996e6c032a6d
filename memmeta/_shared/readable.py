"""Public objects as a person reads them: short signatures in `help`, reprs without addresses."""

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memmeta._shared import checks

LONGEST = 200  # characters of a signature with annotations; longer ones are shown without
MOST_LEAVES = 8  # of a container that is written out

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


class Catalogue(dict[str, Made]):
    """A dict by name that says which name was meant."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"no {name!r}: choose one of {', '.join(self)}.{checks.meant(name, self)}")


class Verbatim:
    """Stands in a signature for what has no short repr of its own."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class Named(functools.partial[Any]):
    """A function that shows how it was made; a partial, so that no call of Python's is added."""

    text: str

    def __repr__(self) -> str:
        return self.text


def named(factory: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Decorate what makes a function, so that the function's repr is the call that made it.

    Example:
        >>> @named
        ... def scaled(factor, *, shift=0.0):
        ...     return lambda x: factor * x + shift
        >>> scaled(2), scaled(2)(3)
        (scaled(factor=2), 6.0)
    """

    @functools.wraps(factory)
    def make(*arguments: Arguments.args, **options: Arguments.kwargs) -> Made:
        made: Any = factory(*arguments, **options)
        given = inspect.signature(factory).bind(*arguments, **options).arguments
        inside = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
        text = f"{factory.__name__}({inside})"
        if hasattr(made, "_replace"):
            return cast(Made, made._replace(name=text))
        found = Named(made)
        functools.update_wrapper(found, made)
        found.text = text
        return cast(Made, found)

    return make


def shown(value: Any) -> str:
    """A value in a few words: arrays by dtype and shape, functions by name.

    Example:
        >>> shown({"w": np.zeros((2, 3), np.float32), "f": shown, "n": np.float32(0.25)})
        "{'w': float32[2,3], 'f': shown, 'n': 0.25}"
    """
    if isinstance(value, jax.core.Tracer) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        return _array(value)
    if isinstance(value, optax.GradientTransformation):
        return f"<optax {value.init.__qualname__.partition('.')[0]}>"
    if not inspect.isclass(value) and _has_fields(value):
        return record(value)
    if isinstance(value, dict) and type(value).__repr__ is dict.__repr__:
        return "{" + _several([f"{key!r}: {shown(found)}" for key, found in value.items()]) + "}"
    if isinstance(value, tuple | list):
        inside = _several(list(map(shown, value)))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, functools.partial) and not isinstance(value, Named):
        return f"partial({shown(value.func)}, ...)"
    text = repr(value)
    if " at 0x" in text or inspect.isroutine(value) or isinstance(value, type):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return str(name).replace(".<locals>", "")
    return text


def _array(value: Any) -> str:
    dtype, shape = value.dtype, value.shape
    known = shape == () and not isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    if known and isinstance(value, jax.Array):  # else donated, or of other processes too
        known = not value.is_deleted() and value.is_fully_addressable
    if known and jnp.issubdtype(dtype, np.number):  # of jax, which knows bfloat16 and keys
        return f"{float(value):.4g}" if jnp.issubdtype(dtype, np.inexact) else str(int(value))
    return f"{dtype}[{','.join(map(str, shape))}]"


def _several(texts: list[str]) -> str:
    more = f", ... {len(texts) - MOST_LEAVES} more" if len(texts) > MOST_LEAVES else ""
    return ", ".join(texts[:MOST_LEAVES]) + more


def record(self: Any) -> str:
    """The repr of a dataclass or a named tuple: its fields in a few words, without absent ones.

    A named tuple whose field `name` says how it was made is shown by that alone.
    """
    made = getattr(self, "name", None) if hasattr(self, "_fields") else None
    if isinstance(made, str) and made.endswith(")"):
        return made
    if dataclasses.is_dataclass(self):
        names = [field.name for field in dataclasses.fields(self) if field.repr]
    else:
        names = list(self._fields)
    fields = ((name, getattr(self, name, None)) for name in names)
    inside = ", ".join(f"{name}={shown(value)}" for name, value in fields if value is not None)
    return f"{type(self).__name__}({inside})"


def readable(room: str) -> None:
    """Make what is public in a room readable.

    Functions and classes get short signatures, dataclasses and named tuples reprs, and a name that
    is nearly right is answered with the right one.
    """
    module = sys.modules[room]
    if "__getattr__" not in vars(module):
        vars(module)["__getattr__"] = functools.partial(_missing, room)
    for name, part in list(sys.modules.items()):
        if name == room or name.startswith(f"{room}."):
            for value in list(vars(part).values()):
                if _is_record(value) and value.__module__ == name:
                    setattr(value, "__repr__", record)  # noqa: B010 (a class of any kind)
    for name in module.__all__:
        value = vars(module).get(name)
        if _is_record(value):
            made = vars(value).get("__init__" if dataclasses.is_dataclass(value) else "__new__")
            made = getattr(made, "__func__", made)
            if inspect.isfunction(made):
                _shorten(made, value)
        elif inspect.isfunction(value):
            _shorten(value, value)


def _is_record(value: Any) -> bool:
    return inspect.isclass(value) and _has_fields(value)


def _has_fields(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or hasattr(value, "_fields")


def _missing(room: str, name: str) -> NoReturn:
    raise checks.no_attribute(room, name, sys.modules[room].__all__)


def _shorten(function: Any, owner: Any) -> None:
    signature = inspect.signature(function)
    names = {id(v): k for k, v in vars(sys.modules[owner.__module__]).items() if k[0] != "_"}
    parameters = [
        parameter.replace(
            annotation=_annotation(parameter.annotation, names), default=_default(parameter.default)
        )
        for parameter in signature.parameters.values()
    ]
    returned = _annotation(signature.return_annotation, names)
    short = signature.replace(parameters=parameters, return_annotation=returned)
    if len(str(short)) > LONGEST:
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
        short = short.replace(parameters=bare)
    function.__signature__ = short


def _default(value: Any) -> Any:
    """A default as it is; a function or a class by its name."""
    if value is not inspect.Parameter.empty and (
        inspect.isroutine(value) or inspect.isclass(value)
    ):
        return Verbatim(shown(value))
    return value


def _annotation(annotation: Any, names: dict[int, str]) -> Any:
    if annotation is inspect.Parameter.empty:
        return annotation
    return Verbatim(_short(annotation, names))


def _short(annotation: Any, names: dict[int, str]) -> str:
    """An annotation without modules and without what aliases stand for."""
    alias = names.get(id(annotation))
    if alias is not None and "PyTree[Any]" not in repr(annotation):
        return alias
    if isinstance(annotation, str):
        text = annotation
    elif isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        text = annotation.__name__ if annotation.__module__ != "jaxtyping" else repr(annotation)
        text = "None" if annotation is type(None) else text
    else:
        parts = getattr(annotation, "__args__", ())
        union = "Union[" in repr(annotation) or "Optional[" in repr(annotation)
        if parts and (union or " | " in repr(annotation)) and not _is_generic(annotation):
            return " | ".join(_short(part, names) for part in parts)
        text = repr(annotation)
    text = re.sub(r"(?:\b\w+\.)+(?=[A-Za-z_])", "", text)
    text = re.sub(r"\bCallable\[.*\]", "Callable", text)
    return text.replace("PyTree[Any]", "PyTree").replace("NoneType", "None")


def _is_generic(annotation: Any) -> bool:
    origin = getattr(annotation, "__origin__", None)
    return origin is not None and isinstance(origin, type)

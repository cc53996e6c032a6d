"""Messages of the library in the words of the command line."""

import logging
import re
from collections.abc import Iterable

NOTHING = "(?!)"
"""The pattern that matches nothing."""


def in_options(message: str, names: Iterable[str], flags: Iterable[str] = ()) -> str:
    """Write the names of arguments in a message as options of the command line.

    A name of one ordinary word is replaced only where it can be nothing else: at the beginning,
    before a colon, and before a sign.

    Args:
        message: the message.
        names: the names of arguments that have an option.
        flags: those of them that are given without a value.

    Returns:
        The message.

    Example:
        >>> in_options("shots=1 and queries=15: too many queries; see log_every",
        ...            ["shots", "queries", "log_every"])
        '--shots=1 and --queries=15: too many queries; see --log-every'
        >>> in_options("ridge: expected 0 or more", ["ridge"])
        '--ridge: expected 0 or more'
        >>> in_options("use shots + test_queries <= 5", ["shots", "test_queries"])
        'use --shots + --test-queries <= 5'
        >>> in_options("uneven=True takes them", ["uneven"], ["uneven"])
        '--uneven takes them'
        >>> in_options("/data_dir/ways=3.png: my data: no", ["data", "data_dir", "ways"])
        '/data_dir/ways=3.png: my data: no'
        >>> in_options("c.json: unknown: 'data_dir'", ["data_dir"])
        "c.json: unknown: 'data_dir'"
    """
    names = sorted(names, key=len, reverse=True)
    single = "|".join(name for name in names if "_" not in name) or NOTHING
    compound = "|".join(name for name in names if "_" in name) or NOTHING
    flag = "|".join(flags) or NOTHING
    free = r"(?<![\w/.'\"-])"  # neither a part of another word or path, nor quoted

    def option(found: re.Match[str]) -> str:
        return "--" + found[1].replace("_", "-")

    message = re.sub(rf"{free}({flag})=True\b", option, message)
    message = re.sub(rf"^({single})(?=: | and --| and [a-z]+_)", option, message)
    message = re.sub(rf"{free}({single})(?==|:? [<>]= | \+ )", option, message)
    return re.sub(rf"{free}({compound})(?![\w/'\"(]|\.\w)", option, message)


class InOptions(logging.Formatter):
    """Formats a log line in the words of the command line."""

    def __init__(self, names: Iterable[str], flags: Iterable[str]) -> None:
        super().__init__("memmeta: %(message)s")
        self.names, self.flags = tuple(names), tuple(flags)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return in_options(super().format(record), self.names, self.flags)

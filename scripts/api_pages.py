"""Docs: `::: all of PACKAGE` on a page stands for every public name of that package."""

import importlib
import inspect
import re
from typing import Any

MARK = re.compile(r"^::: all of ([\w.]+)$", re.MULTILINE)
OPTIONS = """
    options:
      show_root_heading: true
      show_root_toc_entry: true
      show_root_full_path: false
"""


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Write out the marks of one page."""
    return MARK.sub(lambda found: entries(found[1]), markdown)


def entries(package: str) -> str:
    """An entry for each name in a package's `__all__`, in that order."""
    module = importlib.import_module(package)
    names = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    return "\n".join(f"::: {home(package, name)}{OPTIONS}" for name in names)


def home(package: str, name: str) -> str:
    """Where a public name is defined: a function may share its name with the module it is in."""
    value = getattr(importlib.import_module(package), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{package}.{name}"

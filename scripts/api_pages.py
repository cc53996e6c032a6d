"""Docs: `::: all of PACKAGE` on a page stands for every public name of that package."""

import importlib
import inspect
import re
from pathlib import Path
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
    """A table of the names in a package's `__all__`, and an entry for each, in that order."""
    module = importlib.import_module(package)
    names = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    rows = [f"| [`{name}`][{package}.{name}] | {first_line(module, name)} |" for name in names]
    entries = [f"::: {package}.{name}{OPTIONS}" for name in names]
    return "\n".join(["| Name | What it is |", "|---|---|", *rows, "", *entries])


def first_line(module: Any, name: str) -> str:
    """What a public name's docstring says first; of a value, the text below it in its file."""
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return (inspect.getdoc(value) or "").partition("\n")[0].replace("|", "\\|")
    for path in Path(module.__file__).parent.glob("*.py"):
        found = re.search(rf'^{name}\b.*?^"""(.*?)(\n|""")', path.read_text(), re.M | re.S)
        if found:
            return found[1].replace("|", "\\|")
    return ""

"""Docs: `::: all of PACKAGE` on a page stands for every public name of that package."""

import ast
import importlib
import inspect
import re
from itertools import pairwise
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
    documented = inspect.isclass(value) or inspect.isfunction(value)
    text = inspect.getdoc(value) if documented else text_below(module, name)
    if not text:
        raise ValueError(f"{module.__name__}.{name}: expected a docstring, found none")
    return " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|")


def text_below(module: Any, name: str) -> str | None:
    """The string that stands below the assignment of a name in one of a package's files."""
    for path in Path(module.__file__).parent.glob("*.py"):
        for statement, following in pairwise(ast.parse(path.read_text(encoding="utf-8")).body):
            match statement, following:
                case (
                    ast.AnnAssign(ast.Name(found)) | ast.Assign([ast.Name(found)]),
                    ast.Expr(ast.Constant(str(text))),
                ) if found == name:
                    return text
    return None

"""Benchmarks of one question import nothing of another, and nothing private of the library."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SHARED = {"harness", "problems"}
QUESTIONS = {path.parent.name for path in FOLDER.glob("*/__init__.py")} - SHARED


def imports(path: Path) -> list[str]:
    """The lines that import something, each as `package.module.name`."""
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^\s*(?:from (\S+) import (\w+)|import (\S+))", text, re.MULTILINE)
    return [".".join(filter(None, parts)) for parts in lines]


def test_the_folders_are_the_questions():
    assert {"cost", "convergence", "accuracy", "peers", "scaling"} <= QUESTIONS


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda p: p.stem)
def test_folders_share_the_harness_and_the_problems_alone(path):
    own = path.parent.name
    allowed = SHARED if own == "benchmarks" else {own, *SHARED}
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "benchmarks":
            assert rest[0] in allowed, name
        if package == "memmeta":
            assert not any(part.startswith("_") for part in rest), name

"""The docs: built with warnings as errors, complete, free of the network, every example run."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

import memmeta

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
RUNNABLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    target = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(target)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return target


def public_names():
    """(module, name) for all that a module without an underscore lists in its `__all__`."""
    modules = [m.name for m in pkgutil.walk_packages(memmeta.__path__, "memmeta.")]
    for path in ["memmeta", *(m for m in modules if "._" not in m)]:
        module = importlib.import_module(path)
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                yield path, name


def test_every_public_name_has_an_entry(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    homes = {}
    for package, name in public_names():
        value = getattr(importlib.import_module(package), name)
        homes.setdefault((name, id(value)), set()).add(f"{package}.{name}")
    missing = [names for names in homes.values() if not names & entries]
    assert not missing, f"not on any page of docs/api: {missing}"


class Loaded(HTMLParser):
    """Collects what a page makes the browser fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(attributes.get("src", ""))
        if tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(attributes.get("href", ""))


def test_reading_the_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        remote = [url for url in loaded.found if re.match(r"(https?:)?//", url or "")]
        assert not remote, f"{page.relative_to(site)} fetches {remote}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names = {"__name__": "page"}
    for block in RUNNABLE.finditer(text):
        # as many empty lines before it as on the page, so that a traceback shows the page's line
        lines = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines + block[1], str(page), "exec"), names)


def test_the_map_names_what_exists():
    """Every `memmeta.…` in docs/design.md can be imported; every room in its table is there."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for path in re.findall(r"`(memmeta(?:\.\w+)+)`", text):
        assert pkgutil.resolve_name(path) is not None
    for path in re.findall(r"`((?:memmeta|docs|tests|scripts|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    rooms = text.partition("| Room |")[2].partition("\n\n")[0]
    for name in re.findall(r"^\|([^|]*)\|", rooms, re.MULTILINE):
        for room in re.findall(r"`(\w+)`", name):
            assert importlib.util.find_spec(f"memmeta.{room}"), room

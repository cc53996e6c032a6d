"""The docs: built with warnings as errors, complete, free of the network, every example run."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import memmeta as mm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
ALL_OF = re.compile(r"^::: all of ([\w.]+)$", re.MULTILINE)
ROOMS = "certificate|few_shot|hypergradient|inner|linear_solve|meta|models"
NAME = re.compile(rf"`(?:(?:memmeta|mm)\.|(?=(?:{ROOMS})\.))((?:\w+\.)*\w+)[`(]")
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
    modules = [m.name for m in pkgutil.walk_packages(mm.__path__, "memmeta.")]
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


def test_a_public_name_has_one_entry():
    """The rooms on the pages of docs/api, each once, share no name and leave none out."""
    pages = (ROOT / "docs" / "api").glob("*.md")
    rooms = [room for page in pages for room in ALL_OF.findall(page.read_text(encoding="utf-8"))]
    entries = Counter(
        (name, id(value))
        for room in map(importlib.import_module, rooms)
        for name, value in vars(room).items()
        if name in room.__all__ and not inspect.ismodule(value)
    )
    assert set(entries.values()) == {1}, [entry for entry, times in entries.items() if times > 1]


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


def test_the_house_has_few_doors():
    """A newcomer sees at most twelve entries; the package's own three files aside."""
    shown = {path.name for path in Path(mm.__file__).parent.iterdir()}
    assert len(shown - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}) <= 12


def test_the_public_names_are_few():
    """What is promised can be looked over: 149 names in all rooms together."""
    assert len({name for _, name in public_names()}) <= 149


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page):
    """Every `memmeta.…`, `mm.…` and `room.…` can be imported, every path of a file is one."""
    text = page.read_text(encoding="utf-8")
    for name in NAME.findall(text):
        assert pkgutil.resolve_name(f"memmeta.{name}") is not None
    for path in re.findall(
        r"`((?:memmeta|docs|tests|scripts|benchmarks|notebooks)/[\w./]*)`", text
    ):
        assert (ROOT / path).exists(), path


def test_the_map_has_the_rooms_that_there_are():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    column = re.findall(r"^\|([^|]*)\|", text.partition("| Room |")[2].partition("\n\n")[0], re.M)
    rooms = {room for cell in column for room in re.findall(r"`(\w+)`", cell)}
    there = {module.name for module in pkgutil.iter_modules(mm.__path__)}
    assert rooms == {name for name in there if not name.startswith("_")} | {"__main__"}


def files_run_by(function, *arguments):
    """The files below memmeta/ of which a function of Python is called while this one runs."""
    home, files = str(ROOT / "memmeta"), set()

    def record(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(home):
            files.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    sys.setprofile(record)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return files


def test_the_walk_is_that_of_a_meta_step():
    """docs/design.md names the files that run when a meta-step is traced, in at most 12 stops."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    walk = page.partition("## One meta-step, file by file")[2].partition("\n## ")[0]
    stops = re.findall(r"^\| (\d+) \| `(memmeta/[\w/.]+)` \|", walk, re.MULTILINE)
    assert [int(number) for number, _ in stops] == list(range(1, len(stops) + 1))
    assert len(stops) <= 12

    problem = mm.Problem(
        embed=lambda theta, task: (theta, task),
        inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c[0] - c[1]) ** 2),
        outer_loss=lambda phi, c: (0.5 * jnp.sum(phi**2), {}),
        init=jnp.zeros_like,
    )
    inner = mm.InnerLoop(optax.sgd(0.1), steps=20)
    step = mm.make_meta_step(problem, inner, mm.hypergradient.implicit(), optax.sgd(0.1))
    state, tasks = step.init(jnp.zeros(2)), jnp.ones((3, 2))
    ran = files_run_by(jax.eval_shape, step.update, state, tasks)
    assert ran == {path for _, path in stops}

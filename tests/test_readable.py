"""What a person sees of public objects: signatures, reprs, and names that are nearly right."""

import importlib
import inspect
import pydoc

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import quadratic_problem, quadratic_tasks

import memmeta as mm
from memmeta.data import DataError, Dataset, load
from memmeta.meta import WarmStart
from memmeta.runs import Config

ROOMS = [
    *("memmeta", "memmeta.problem", "memmeta.inner", "memmeta.linear_solve"),
    *("memmeta.hypergradient", "memmeta.certificate", "memmeta.meta", "memmeta.recipes"),
    *("memmeta.few_shot", "memmeta.few_shot.algorithms", "memmeta.models", "memmeta.data"),
    *("memmeta.runs", "memmeta.runs.checkpoints"),
]
LONGEST = 200
OF_MANY_OPTIONS = (Config, mm.hypergradient.Report)  # one parameter for each option, each figure


def public():
    """Every public function and class."""
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield pytest.param(value, id=f"{room}.{name}")


@pytest.mark.parametrize("value", list(public()))
def test_signatures_are_short(value):
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    signature = str(inspect.signature(value))
    assert "0x" not in signature
    assert len(signature) <= LONGEST or value in OF_MANY_OPTIONS
    for long in ("jaxtyping.", "jaxlib", "collections.abc", "memmeta.", "typing."):
        assert long not in signature
    page = pydoc.plain(pydoc.render_doc(value))
    assert " at 0x" not in page.partition("Methods defined here")[0]


def test_the_signature_of_a_method():
    signature = str(inspect.signature(mm.linear_solve.cg))
    assert signature == (
        "(steps: int = 20, *, tolerance: float | None = None, absolute_tolerance: float = 0.0, "
        "damping: float = 0.0, preconditioner: Preconditioner | None = None) -> LinearSolver"
    )
    assert "inner=InnerLoop(solver=accelerated(), steps=50)" in str(
        inspect.signature(mm.algorithms.memory_reduced)
    )
    assert (
        list(inspect.signature(mm.InnerLoop()).parameters)
        == list(inspect.signature(mm.InnerLoop.__call__).parameters)[1:]
    )


def objects():
    """One of each kind of public object."""
    problem, loop = quadratic_problem(), mm.InnerLoop(steps=3)
    step = mm.make_meta_step(problem, loop, mm.hypergradient.implicit(), optax.sgd(0.1))
    tasks = quadratic_tasks(jax.random.key(0), tasks=2)
    state, metrics = step(step.init(jnp.ones(4)), tasks)
    glyphs = load("glyphs", "test")
    host = mm.data.load_host("glyphs", "test")
    yield from (problem, loop, step, state, metrics, metrics.counts, metrics.report, glyphs, host)
    yield mm.data.Episodes().sample(glyphs, jax.random.key(0))
    yield mm.evaluate(problem, loop, jnp.ones(4), tasks)
    yield from (mm.data.Episodes(), mm.data.Points(), mm.data.Reading(), mm.data.Augmentation())
    yield from (mm.data.HostEpisodes(mm.data.Episodes()), mm.data.Limits(), mm.data.Warp())
    yield from (mm.meta.guard(), mm.meta.reset_every(3), mm.meta.lifetimes(1, 2))
    yield WarmStart(step, 2)
    yield mm.InnerLoop(optax.sgd(0.1), view=mm.inner.minibatch(2, of=lambda path: True))
    yield mm.inner.step_by_step(lambda path: True)
    yield mm.inner.InnerSolver(lambda *_: (), lambda *_: ())
    yield mm.implicit_solution(lambda phi, c: jnp.sum(phi))
    yield mm.models.conv4(5, width=4)
    yield from (make() for make in mm.inner.SOLVERS.values())
    yield from (make() for make in mm.linear_solve.SOLVERS.values())
    yield from (entry.make() for entry in mm.hypergradient.ESTIMATORS.values())
    yield from mm.hypergradient.ESTIMATORS.values()
    network = mm.models.conv4(5, width=4)
    yield from (method(network) for method in mm.algorithms.METHODS.values())
    yield from (Config(), mm.linear_solve.cg()(lambda x: x, jnp.ones(2)))
    yield mm.hypergradient.scheduled(lambda step: mm.hypergradient.implicit())
    yield mm.hypergradient.Chunk.of(tasks)


def test_reprs_can_be_read():
    for found in objects():
        text = repr(found)
        assert " at 0x" not in text, text
        assert len(text) < 1000, text
        assert "array(" not in text.lower(), text


def test_reprs_say_how_it_was_made():
    cg = mm.linear_solve.cg(5, damping=0.1)
    assert repr(mm.hypergradient.implicit(cg)) == "implicit(solver=cg(steps=5, damping=0.1))"
    assert repr(mm.InnerLoop(steps=3)) == "InnerLoop(solver=accelerated(), steps=3)"
    assert repr(Dataset.from_arrays(jnp.zeros((2, 3)), [0, 1])).startswith(
        "Dataset(inputs=float32[2,1,3], count=int32[2]"
    )
    metrics = mm.meta.MetaState(jnp.int32(3), {"w": jnp.ones(2)}, (), jax.random.key(0), None)
    assert "step=3, meta_params={'w': float32[2]}" in repr(metrics)


@pytest.mark.parametrize(
    ("room", "wrong", "right"),
    [
        (mm, "make_metastep", "make_meta_step"),
        (mm, "meta_step", "make_meta_step"),
        (mm.algorithms, "memory_reducd", "memory_reduced"),
        (mm.hypergradient, "implict", "implicit"),
        (mm.linear_solve, "cgg", "cg"),
        (mm.inner, "acelerated", "accelerated"),
        (mm.models, "conv_4", "conv4"),
        (mm.recipes, "sobaa", "soba"),
    ],
)
def test_names_that_are_nearly_right(room, wrong, right):
    with pytest.raises(AttributeError, match=f"Did you mean '{right}'"):
        getattr(room, wrong)


def test_data_sets_that_are_nearly_right():
    with pytest.raises(DataError, match="Did you mean 'glyphs'"):
        load("glyph", "train")
    with pytest.raises(KeyError, match="Did you mean 'protonet'"):
        mm.algorithms.METHODS["protonets"]
    with pytest.raises(KeyError, match="Did you mean 'implicit'"):
        mm.hypergradient.ESTIMATORS["implict"]


def test_a_donated_state_can_be_shown():
    problem, loop = quadratic_problem(), mm.InnerLoop(steps=1)
    step = mm.make_meta_step(problem, loop, mm.hypergradient.implicit(), optax.sgd(0.1))
    state = step.init(jnp.ones(4))
    jax.tree.map(lambda leaf: leaf.delete(), state)
    assert "step=int32[], meta_params=float32[4]" in repr(state)

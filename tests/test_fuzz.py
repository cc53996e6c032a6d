"""Whatever is given to a public entry: it works, or an error names the argument."""

import ast
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import quadratic_problem, quadratic_tasks

import memmeta as mm
from memmeta.__main__ import main
from memmeta.data import DataError, Episodes, load
from memmeta.runs import Config, UserError

FEW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WHOLE = st.integers(-(10**20), 10**20)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    WHOLE,
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
# A wrong type is caught by the annotations in these tests, by a crash of Python's own elsewhere.
NAMED = (ValueError, UserError, DataError)


def complaint(function):
    """What an error said; empty where there was none."""
    try:
        function()
    except NAMED as error:
        return str(error)
    return ""


def make_step(chunk=None):
    return mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(steps=1),
        mm.hypergradient.implicit(),
        optax.sgd(0.1),
        task_chunk=chunk,
    )


@FEW
@given(chunk=WHOLE, count=st.integers(0, 6))
def test_any_chunk_and_any_number_of_tasks(chunk, count):
    batch = jnp.ones((count, 2))
    problem = mm.Problem(
        embed=lambda theta, task: theta * task,
        inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2),
        outer_loss=lambda phi, c: (jnp.sum(phi), {}),
        init=lambda theta: jnp.zeros(2),
    )

    def run():
        step = mm.make_meta_step(
            problem,
            mm.InnerLoop(steps=1),
            mm.hypergradient.implicit(),
            optax.sgd(0.1),
            task_chunk=chunk,
        )
        jax.eval_shape(step.update, step.init(jnp.float32(1)), batch)

    message = complaint(run)
    fits = chunk >= 1 and count > 0 and count % chunk == 0
    assert (message == "") == fits
    assert fits or message.startswith(("task_chunk:", "tasks:"))


TREES = st.recursive(
    st.sampled_from([(), (2,), (2, 3), (0,), (0, 2), (3,)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@FEW
@given(shapes=TREES)
def test_any_tree_of_tasks(shapes):
    batch = jax.tree.map(
        lambda shape: np.zeros(shape, np.float32), shapes, is_leaf=lambda n: isinstance(n, tuple)
    )
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) == 1 and sizes.pop() not in ((), (0,)):
        return  # a batch of tasks; whether it suits the problem is the problem's business
    step = make_step()
    with pytest.raises(ValueError, match=r"^tasks: "):
        step(step.init(jnp.ones(4)), batch)


@FEW
@given(theta=st.one_of(st.none(), st.integers(0, 9), st.lists(st.integers(0, 9), max_size=3)))
def test_parameters_without_anything_to_learn(theta):
    with pytest.raises(ValueError, match=r"^meta_params: "):
        make_step().init(jax.tree.map(jnp.int32, theta))


@FEW
@given(steps=WHOLE)
def test_any_number_of_inner_steps(steps):
    problem, phi = quadratic_problem(), jnp.zeros(6)
    task = jax.tree.map(lambda leaf: leaf[0], quadratic_tasks(jax.random.key(0), tasks=1))

    def run():
        loop = mm.InnerLoop(optax.sgd(0.1), steps=steps)
        jax.eval_shape(lambda phi: loop(problem, phi, (phi, task, phi)), phi)

    message = complaint(run)
    assert (message == "") == (0 <= steps < 2**31)
    assert message.startswith(("steps:", "")[message == ""])


@FEW
@given(ways=WHOLE, shots=WHOLE, queries=WHOLE)
def test_any_episodes(ways, shots, queries):
    dataset = load("glyphs", "test")
    message = complaint(lambda: Episodes(ways, shots, queries).check(dataset))
    assert message == "" or any(name in message for name in ("ways=", "shots=", "queries="))


@FEW
@given(name=st.text(max_size=10), split=st.text(max_size=10))
def test_any_name_of_data(name, split):
    with pytest.raises(DataError, match="unknown"):
        load(name, split)
    with pytest.raises(DataError, match="unknown"):
        load("glyphs", split)


FIELDS = [field.name for field in dataclasses.fields(Config)]


@settings(FEW, max_examples=150)
@given(changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), ODD, max_size=3))
def test_any_configuration_file(changes):
    text = json.dumps(json.loads(Config().to_json()) | changes)
    message = complaint(lambda: Config.from_json(text, "config.json"))
    if message:
        assert message.startswith("config.json: ")
    else:
        config = Config.from_json(text, "config.json")
        assert Config.from_json(config.to_json(), "again") == config


@settings(FEW, max_examples=100)
@given(text=st.text(max_size=60) | st.sampled_from(["[" * 50_000, "1e999", "{}", '{"a":' * 9000]))
def test_any_text_as_a_configuration(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="replace")
    if text == "{}":
        return  # every option left at its default
    assert main(["evaluate", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "config.json" in lines[0]


@FEW
@given(
    option=st.sampled_from(["ways", "tasks", "seed", "log-every", "episodes", "rate", "devices"]),
    value=st.one_of(WHOLE, st.floats(), st.text(max_size=6)),
)
def test_any_option(option, value, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("no run can start here")
    arguments = ["train", "--run", str(blocked / "run"), f"--{option}={value}"]
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code in (1, 2)
    assert "Traceback" not in captured.err + captured.out


RUNS_WHAT_IT_READS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle",
    "marshal",
    "shelve",
    "dill",
}


def test_nothing_that_is_read_is_run():
    """No module evaluates text or unpickles; numpy is told not to."""
    for path in Path(mm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id}
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & RUNS_WHAT_IT_READS, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
                options = {option.arg: option.value for option in node.keywords}
                assert not ast.literal_eval(options["allow_pickle"]), f"{path}:{node.lineno}"

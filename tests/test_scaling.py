"""Scaling over devices: what is read from programs, and the model of a pod in closed form."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import quadratic_problem, quadratic_tasks

import memmeta as mm
from benchmarks.harness.programs import collectives, equations, product_flops
from benchmarks.scaling import decoder, paper, sharded
from benchmarks.scaling.devices import aims
from benchmarks.scaling.pod import Chip, Work, arithmetic, curve, first_break, predicted, work
from memmeta.meta import task_mesh
from memmeta.models import conv4

CHIP = Chip(peak=1e12, share=0.5, bandwidth=1e9, latency=1e-6, torus=2, launch=1e-6)
WORK = Work(flops=1e9, products=10, parameters=1000, summed=1000)


def test_flops_of_products_closed_form():
    matrix = jnp.ones((5, 5))

    def program(x):
        return jnp.sum(jax.lax.scan(lambda x, _: (x @ matrix, None), x, length=7)[0])

    assert arithmetic(jax.make_jaxpr(program)(matrix).jaxpr, 1) == (7 * 2 * 5**3, 7)


def test_flops_of_convolutions_closed_form():
    network = conv4(2, width=8, depth=1, image_shape=(4, 4, 3))
    params, images = network.init(jax.random.key(0))["body"], jnp.ones((2, 4, 4, 3))

    def program(params):
        return jnp.sum(network.body(params, images, jnp.ones(2)))

    def flops(program):
        found = equations(jax.make_jaxpr(program)(params).jaxpr, 1)
        return [product_flops(e) for e, _ in found if e.primitive.name.startswith("memmeta_")]

    convolution = 2 * (2 * 4 * 4 * 8) * 27
    assert flops(program) == [convolution]
    assert flops(jax.grad(program)) == [convolution] * 2  # the kernel's gradient too


def test_flops_are_the_compilers_own_where_nothing_loops():
    a, b = jnp.ones((16, 32)), jnp.ones((32, 24))
    found, _ = arithmetic(jax.make_jaxpr(jnp.dot)(a, b).jaxpr, 1)
    assert found == jax.jit(jnp.dot).lower(a, b).compile().cost_analysis()["flops"]


def test_bytes_of_the_trace_are_those_of_the_compiled_program():
    def step_on(count):
        parts = (quadratic_problem(), mm.InnerLoop(steps=2), mm.hypergradient.implicit())
        mesh = task_mesh(jax.devices()[:count])
        return mm.make_meta_step(*parts, optax.sgd(0.1), mesh=mesh)

    theta, tasks = jnp.ones(4), quadratic_tasks(jax.random.key(0), tasks=8)
    counted = work(step_on(2), theta, jax.tree.map(lambda leaf: leaf[:2], tasks), 2)
    step = step_on(8)
    compiled = step.compiled.lower(step.init(theta), tasks).compile()
    [(name, size)] = collectives(compiled)
    assert name == "all-reduce"
    # the compiler leaves out a scalar that is the same as another
    assert counted.reduced(8) - 8 <= size <= counted.reduced(8)
    assert counted.parameters == 16


def test_the_model_closed_form():
    row = predicted(WORK, CHIP, 16, 64)
    assert row["a device"] == 4
    assert row["compute"] == pytest.approx(1e3 * 4 * 1e9 / 5e11)
    assert row["bandwidth"] == pytest.approx(1e3 * 2 * (1000 + 4 * 14) * 15 / 16 / 1e9)
    assert row["latency"] == pytest.approx(1e3 * 2 * 4 * 1e-6)
    assert row["ms"] == pytest.approx(row["compute"] + row["bandwidth"] + row["latency"])
    assert row["limit"] == ""


def test_what_stands_in_the_way():
    assert predicted(WORK, CHIP, 128, 100)["limit"] == "28 devices have no task"
    assert predicted(WORK, CHIP._replace(latency=1.0), 4, 8)["limit"] == "the all-reduce"
    small = WORK._replace(products=10_000)
    assert predicted(small, CHIP, 1, 1)["limit"] == "products too small for a chip"
    assert first_break(WORK, CHIP, 4, 32, 100)["no task left"] == 64
    assert first_break(WORK, CHIP, 4, 32, 20)["no task left"] == "none"


def test_without_a_network_to_wait_for_scaling_is_perfect():
    free = CHIP._replace(latency=0.0, bandwidth=float("inf"), launch=0.0)
    for weak in (False, True):
        rows = curve(WORK, free, (1, 2, 8), 8, weak)
        assert [row["efficiency"] for row in rows] == [1, 1, 1]


def test_aims_are_missed_where_devices_disagree_or_talk_too_much():
    row = {"devices": 2, "apart": 1e-7, "messages": "all-reduce", "bytes": 1080, "bytes of θ": 1000}
    assert [line[""] for line in aims({"strong": [row]})] == ["holds"] * 3
    bad = row | {"apart": 1.0, "messages": "all-reduce, all-gather", "bytes": 9000}
    assert [line[""] for line in aims({"strong": [row], "weak": [bad]})] == ["MISSED"] * 3


SHAPE = decoder.Shape(2, width=16, heads=2, hidden=24, words=32, rank=2, batch=16, length=4)


def test_arguments_on_paper_are_those_of_the_program():
    mesh = sharded.mesh_of(1, 8)
    state, batch = sharded.shapes(SHAPE, mesh, each=3)

    def of_device(tree):
        leaves = jax.tree.leaves(tree)
        shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
        return sum(4 * math.prod(shape) for shape in shapes)

    found = paper.arguments(SHAPE, 8, each=3)
    assert found["θ"] == of_device(state.meta_params)
    assert found["Adam's moments"] == of_device(state.optimizer[0][1:])
    assert found["data"] == of_device(batch)
    jax.eval_shape(decoder.meta_step(SHAPE, mesh).update, state, batch)


def test_what_is_kept_on_paper_closed_form():
    def kept(**copies):
        none = dict.fromkeys(paper.Copies._fields, 0.0)
        found = paper.temporary(SHAPE, 8, paper.Copies(**{**none, **copies}))
        return sum(found.values())

    matrices = 16 * 48 + 16 * 16 + 16 * 48 + 24 * 16
    assert kept(layer=1) == 4 * matrices
    assert kept(inputs=1) == 4 * 2 * (2 * 4) * 16  # two sequences of four words on a device
    assert kept(table=1) == 4 * 32 * 16
    assert kept(outputs=1) == 4 * (2 * 4) * 32
    assert kept(scores=1) == 4 * 2 * 2 * 4**2
    assert kept(phi=1) == 4 * 2 * 2 * (16 + 48 + 16 + 16 + 16 + 48 + 24 + 16) / 8


def test_aims_of_sharding_are_missed_where_a_device_holds_more_than_its_part():
    def lines(share):
        row = {"tasks × model": "· 8 / alone", "in all, kB": share}
        tables = {"bytes": [row], "gradient": [{"apart": 1e-6}]}
        return [line[""] for line in sharded.aims(tables, [{"paper / compiled": 1.0}], 79e9, 80.0)]

    assert lines(1.1) == ["holds"] * 4
    assert lines(1.3) == ["MISSED", "holds", "holds", "holds"]

"""Programs for chips that are not at hand: every method and estimator, exported for GPU and TPU.

They are traced and lowered, not compiled. So it can be told of them that each operation has a form
for the chip, that none of a CPU's forms is in the text, how large arguments and results are, and
which arrays have an axis of inner steps. How large the temporary buffers are is the decision of the
chip's own compiler; `python -m benchmarks.accelerator` asks the device.
"""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import head_example, network_example

import memmeta as mm
from benchmarks.harness.programs import equations
from benchmarks.problems.workloads import Workload
from memmeta.few_shot.algorithms import METHODS
from memmeta.hypergradient import ESTIMATORS
from memmeta.models import conv4

pytestmark = pytest.mark.slow

CHIPS = ("cuda", "tpu")
TASKS, WAYS, SHOTS, QUERIES, SIDE, WIDTH = 2, 3, 4, 4, 28, 16
LOAD = Workload(TASKS, WAYS, SHOTS, QUERIES, (SIDE, SIDE, 1), WIDTH, depth=2)
STEPS = 251
"""A prime number of inner steps: an axis of this length is one of steps."""
ARRAY = re.compile(r"tensor<((?:\d+x)*)(?:bf|f|i|ui)(\d+)>")
CONVOLUTION = re.compile(
    r"stablehlo\.convolution.* dim_numbers = \[.*?\]x\[(.*?)\]->.*"
    r": \(tensor<(\S+)>, tensor<(\S+)>\)"
)
KERNEL_GRADIENT = "a kernel's gradient with cotangents as its kernel"
FEW_IMAGES = "images a few at a time"


def arrays(text):
    """Shape and bytes of every array of a program's text."""
    for sides, bits in ARRAY.findall(text):
        shape = tuple(map(int, sides.split("x")[:-1]))
        yield shape, math.prod(shape) * max(int(bits) // 8, 1)


def forms_of_a_cpu(text):
    """What no chip should be asked for, of all that the library or JAX writes for a CPU alone."""
    found = set()
    for target in re.findall(r"custom_call @(\w+)", text):
        if re.match("lapack|blas|.*(cpu|python|callback|onednn|eigen)", target):
            found.add(target)
    for kernel_layout, *operands in CONVOLUTION.findall(text):
        images, kernel = ([int(n) for n in each.split("x")[:-1]] for each in operands)
        if kernel_layout == "0, 1, i, o" and kernel[:2] != [3, 3]:
            found.add(KERNEL_GRADIENT)
        elif images[0] < WAYS * min(SHOTS, QUERIES):
            found.add(FEW_IMAGES)
    return found


def exported(function, platforms, monkeypatch, *arguments):
    """The programs as a process on a platform traces and lowers them, and the traced one.

    Traced once: of the platform it runs on the library asks whether that is a CPU.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if "cpu" in platforms else "gpu")
    jitted = jax.jit(function)
    found = [jax.export.export(jitted, platforms=[name])(*arguments) for name in platforms]
    return found, jitted.trace(*arguments)


def further_loops(program, traced):
    """How many loops of a program's text are not in the traced one."""
    written = [each.primitive.name for each, _ in equations(traced.jaxpr.jaxpr, 1)]
    lowered = program.mlir_module().count("stablehlo.while")
    return max(lowered - written.count("scan") - written.count("while"), 0)


def step_and_state(name, **options):
    network = conv4(WAYS, width=WIDTH, image_shape=LOAD.image_shape, depth=LOAD.depth, **options)
    learner = METHODS[name](network)
    step = learner.make_meta_step(optax.adam(1e-3))
    return step, jax.eval_shape(lambda: step.init(learner.init(jax.random.key(0))))


def avals(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_program_for_a_chip(name, monkeypatch):
    """Its arguments and results are the state, the tasks and the metrics, and nothing else."""
    step, state = step_and_state(name)
    programs, traced = exported(step.update, CHIPS, monkeypatch, state, LOAD.shapes())
    for program in programs:
        assert forms_of_a_cpu(program.mlir_module()) == set()
        assert further_loops(program, traced) == 0
        assert avals(program.in_avals) == avals((state, LOAD.shapes()))
        assert avals(program.out_avals) == avals(traced.out_info)


@pytest.mark.parametrize("name", ["memory_reduced", "maml", "r2d2"])
def test_forms_of_a_cpu_would_show(name, monkeypatch):
    step, state = step_and_state(name)
    [program], traced = exported(step.update, ["cpu"], monkeypatch, state, LOAD.shapes())
    found = forms_of_a_cpu(program.mlir_module())
    assert found >= {KERNEL_GRADIENT, FEW_IMAGES}
    assert any("lapack" in form for form in found) == (name == "r2d2")
    assert (further_loops(program, traced) > 0) == (name != "r2d2")


def test_a_body_in_half_precision_asks_for_products_in_half_precision(monkeypatch):
    step, state = step_and_state("maml", dtype=jnp.bfloat16)
    programs, _ = exported(step.update, CHIPS, monkeypatch, state, LOAD.shapes())
    for program in programs:
        found = CONVOLUTION.findall(program.mlir_module())
        assert {kind.split("x")[-1] for _, *pair in found for kind in pair} == {"bf16"}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_has_a_program_for_a_chip(name, monkeypatch):
    """One that is flat in the inner steps has no array of them; one that is linear has iterates."""
    entry = ESTIMATORS[name]
    example = head_example(1, support=30) if entry.heads else network_example(1, hidden=256)
    inner, estimator = mm.InnerLoop(optax.sgd(0.1), STEPS), entry.make()

    def call(theta, tasks, key):
        chunk = mm.hypergradient.Chunk.of(tasks, key=key)
        return estimator(example.problem, inner, theta, chunk)

    arguments = example.theta, example.tasks, jax.random.key(0)
    params = example.problem.init(example.theta)
    iterates = STEPS * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for program in exported(call, CHIPS, monkeypatch, *arguments)[0]:
        text = program.mlir_module()
        assert forms_of_a_cpu(text) == set()
        assert avals(program.in_avals) == avals(arguments)
        along_steps = [size for shape, size in arrays(text) if STEPS in shape]
        assert bool(along_steps) == (entry.memory == "linear")
        if along_steps:
            assert iterates / 2 < max(along_steps) <= 2 * iterates
        gradient = program.out_tree.unflatten(program.out_avals).gradient
        assert avals(gradient) == avals(example.theta)

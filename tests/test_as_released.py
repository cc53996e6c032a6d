"""The paper's experiment as its authors released it, against plain numpy in float64.

Everything below is written from the equations: the network forwards, the derivatives of a real
function by complex steps (exact to rounding), and those of a function with derivatives inside by
central differences. Nothing of it is automatic differentiation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError

import memmeta as mm
from memmeta.few_shot import head_problem
from memmeta.few_shot.algorithms import METHODS
from memmeta.problem import Task
from memmeta.runs import Config

pytestmark = pytest.mark.slow

WAYS, SHAPE, TINY = 3, (8, 8, 3), 1e-30


def body(params, images):
    """conv 3×3 → batch norm by the batch itself → ReLU → max pool 2×2, per block; then flatten."""
    hidden = images
    for name in sorted(params):
        block, (n, height, width, _) = params[name], hidden.shape
        around = np.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
        hidden = sum(
            around[:, i : i + height, j : j + width] @ block["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        )
        mean = hidden.mean((0, 1, 2))
        variance = ((hidden - mean) ** 2).mean((0, 1, 2))
        hidden = block["scale"] * (hidden - mean) / np.sqrt(variance + 1e-5) + block["bias"]
        hidden = np.where(hidden.real > 0, hidden, 0)
        windows = hidden.reshape(n, height // 2, 2, width // 2, 2, -1).transpose(0, 1, 3, 5, 2, 4)
        windows = windows.reshape(*windows.shape[:4], 4)
        largest = windows.real.argmax(-1)[..., None]
        hidden = np.take_along_axis(windows, largest, -1)[..., 0]
    return hidden.reshape(len(hidden), -1)


def softmax(logits):
    exponentials = np.exp(logits - logits.real.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def cross_entropy(head, features, targets):
    chances = softmax(features @ head["kernel"] + head["bias"])
    return -np.log(chances[np.arange(len(targets)), targets]).mean()


def head_gradient(head, features, targets):
    error = softmax(features @ head["kernel"] + head["bias"])
    error[np.arange(len(targets)), targets] -= 1
    return {"kernel": features.T @ error / len(error), "bias": error.mean(0)}


def head_hessian_product(head, v, features):
    chances = softmax(features @ head["kernel"] + head["bias"])
    change = features @ v["kernel"] + v["bias"]
    change = chances * (change - (chances * change).sum(1, keepdims=True))
    return {"kernel": features.T @ change / len(change), "bias": change.mean(0)}


def added(a, weight, b):
    return {name: a[name] + weight * b[name] for name in a}


def inner(a, b):
    return sum((a[name] * b[name]).sum() for name in a)


def adapt_head(head, features, targets, rate, steps):
    for _ in range(steps):
        head = added(head, -rate, head_gradient(head, features, targets))
    return head


def conjugate_gradients(product, b, steps):
    """Exactly `steps` of them, from zero, without a stopping rule."""
    x, r, p = added(b, -1, b), b, b
    for _ in range(steps):
        image = product(p)
        alpha = inner(r, r) / inner(p, image)
        x, following = added(x, alpha, p), added(r, -alpha, image)
        r, p = following, added(following, inner(following, following) / inner(r, r), p)
    return x


def complex_gradient(function, params):
    """∂function/∂params, leaf by leaf: Im function(params + i·tiny·e) / tiny."""
    leaves, structure = jax.tree.flatten(params)
    found = []
    for position, leaf in enumerate(leaves):
        gradient = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            moved = leaf.astype(complex)
            moved[index] += 1j * TINY
            others = [*leaves[:position], moved, *leaves[position + 1 :]]
            gradient[index] = function(structure.unflatten(others)).imag / TINY
        found.append(gradient)
    return structure.unflatten(found)


def algorithm_1(theta, start, task, rate, steps, cg_steps):
    """∂_θ f − ∂²_θφ g v as the gradient of f(θ, φ) − ⟨v, ∂_φ g(θ, φ)⟩ with φ and v held."""
    support, query = body(theta, task.support_inputs), body(theta, task.query_inputs)
    head = adapt_head(start, support, task.support_targets, rate, steps)
    right = head_gradient(head, query, task.query_targets)
    v = conjugate_gradients(lambda u: head_hessian_product(head, u, support), right, cg_steps)

    def lagrangian(theta):
        support, query = body(theta, task.support_inputs), body(theta, task.query_inputs)
        slope = head_gradient(head, support, task.support_targets)
        return cross_entropy(head, query, task.query_targets) - inner(v, slope)

    return complex_gradient(lagrangian, theta)


def iterated(theta, task, rate, steps):
    """The gradient of the query loss after the head's steps."""

    def adapted_loss(theta):
        support = body(theta["body"], task.support_inputs)
        head = adapt_head(theta["head"], support, task.support_targets, rate, steps)
        query = body(theta["body"], task.query_inputs)
        return cross_entropy(head, query, task.query_targets)

    return complex_gradient(adapted_loss, theta)


def maml_loss(theta, task, rate, steps):
    def loss(params, inputs, targets):
        return cross_entropy(params["head"], body(params["body"], inputs), targets)

    support = (task.support_inputs, task.support_targets)
    for _ in range(steps):
        slope = complex_gradient(lambda params: loss(params, *support), theta)
        theta = jax.tree.map(lambda p, g: p - rate * g, theta, slope)
    return loss(theta, task.query_inputs, task.query_targets)


def network(depth=3):
    """As many features as filters where images are halved three times: a head of full rank."""
    return mm.models.conv4(
        WAYS,
        width=3,
        image_shape=SHAPE,
        depth=depth,
        head_scale=1.0,
        initialisation="xavier_uniform",
    )


@pytest.fixture(scope="module")
def tasks():
    """Two tasks of 3-way 8-shot with 4 queries a class."""
    random = np.random.default_rng(0)
    inputs = [random.random((2, WAYS * shots, *SHAPE), np.float32) for shots in (8, 4)]
    targets = [np.tile(np.arange(WAYS, dtype=np.int32).repeat(n), (2, 1)) for n in (8, 4)]
    return Task(inputs[0], targets[0], inputs[1], targets[1])


def doubles(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def each(tasks):
    for number in range(2):
        task = jax.tree.map(lambda leaf, at=number: leaf[at], tasks)
        inputs = doubles((task.support_inputs, task.query_inputs))
        yield Task(inputs[0], task.support_targets, inputs[1], task.query_targets)


def mean_gradient(learner, theta, tasks):
    step = learner.make_meta_step(optax.adam(1e-4), task_chunk=1)
    return step.gradient(step.init(theta), tasks)[0]


def assert_equal(found, references):
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *references)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (found, expected)]
    assert np.linalg.norm(flat[0] - flat[1]) < 1e-4 * np.linalg.norm(flat[1])


@pytest.mark.parametrize("cg_steps", [5, 20])
def test_algorithm_1(cg_steps, tasks):
    model = network()
    params, start = model.init(jax.random.key(0)), model.init(jax.random.key(1))["head"]
    learner = mm.algorithms.memory_reduced(
        model,
        inner=mm.InnerLoop(optax.sgd(0.1), steps=20),
        ridge=0.0,
        cg_steps=cg_steps,
        statistics="separate",
        start=start,
    )
    theta = {"body": params["body"]}
    found = mean_gradient(learner, theta, tasks)["body"]
    start, theta = doubles(start), doubles(theta["body"])
    assert_equal(found, [algorithm_1(theta, start, t, 0.1, 20, cg_steps) for t in each(tasks)])


@pytest.mark.parametrize("recompute_features", [False, True])
@pytest.mark.parametrize(("name", "steps"), [("anil", 10), ("anil", 5), ("itd_bio", 20)])
def test_baselines_whose_head_adapts(name, steps, recompute_features, tasks):
    model = network()
    params = model.init(jax.random.key(0))
    options = {
        "inner": mm.InnerLoop(optax.sgd(0.1), steps=steps),
        "recompute_features": recompute_features,
        "statistics": "separate",
    }
    if name == "itd_bio":
        learner = mm.algorithms.itd_bio(model, start=params["head"], **options)
        theta = {"body": params["body"]}
    else:
        learner, theta = mm.algorithms.anil(model, **options), params
    references = [iterated(doubles(params), task, 0.1, steps) for task in each(tasks)]
    found = mean_gradient(learner, theta, tasks)
    assert_equal(found, [{part: r[part] for part in found} for r in references])


def test_maml(tasks):
    """Along random directions: three inner steps of every layer at rate 0.5."""
    model = network(depth=1)
    theta = model.init(jax.random.key(0))
    inner_loop = mm.InnerLoop(optax.sgd(0.5), steps=3)
    learner = mm.algorithms.maml(model, inner=inner_loop, statistics="separate")
    found, theta = doubles(mean_gradient(learner, theta, tasks)), doubles(theta)
    random, small, pairs = np.random.default_rng(1), 1e-7, []
    for _ in range(3):
        along = jax.tree.map(lambda x: random.standard_normal(x.shape), theta)
        ends = [jax.tree.map(lambda x, d: x + h * d, theta, along) for h in (small, -small)]  # noqa: B023
        losses = [np.mean([maml_loss(end, t, 0.5, 3) for t in each(tasks)]) for end in ends]
        slopes = jax.tree.map(np.vdot, found, along)
        pairs.append((sum(jax.tree.leaves(slopes)), (losses[0] - losses[1]) / (2 * small)))
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-4)


def test_separate_means_that_neither_pass_sees_the_other(tasks):
    model = network()
    theta = model.init(jax.random.key(0))["body"]
    task = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), tasks)
    found = head_problem(model, 0.0, False, "separate").embed({"body": theta}, task)
    for features, inputs in (
        (found.support_features, task.support_inputs),
        (found.query_features, task.query_inputs),
    ):
        np.testing.assert_allclose(features, body(doubles(theta), doubles(inputs)), atol=1e-5)


@pytest.mark.parametrize("name", ["memory_reduced", "stocbio", "amigo", "itd_bio", "pzobo"])
def test_a_start_is_every_tasks_and_never_trained(name):
    model = network()
    theta, start = model.init(jax.random.key(0)), model.init(jax.random.key(1))["head"]
    learner = METHODS[name](model, start=start)
    assert learner.problem.init({"body": theta["body"]}) is start
    assert sorted(learner.init(jax.random.key(0))) == ["body"]


def test_xavier_uniform():
    params = mm.models.conv4(5, width=64, head_scale=1.0, initialisation="xavier_uniform").init(
        jax.random.key(0)
    )
    block, head = params["body"]["ConvBlock_1"], params["head"]
    uniform = {"kernel": (block["kernel"], -((3 / (9 * 64)) ** 0.5)), "scale": (block["scale"], 0)}
    uniform |= {part: (leaf, -1 / 8) for part, leaf in head.items()}
    for values, low in uniform.values():
        high = 1 if low == 0 else -low
        assert low <= values.min() < values.max() <= high
        spread = np.std(values) / ((high - low) / 12**0.5)
        assert 0.5 < spread < 1.5


def test_the_command_lines_random_start_is_the_seeds():
    def start(**options):
        learner = Config(head_start="random", width=4, **options).learner((28, 28, 1))
        return np.asarray(learner.problem.init({})["kernel"])

    assert np.array_equal(start(), start(seed=0))
    assert not np.array_equal(start(), start(seed=1))
    with pytest.raises(ValueError, match="head_start: expected no value, as anil has no such"):
        start(method="anil")


def test_bad_arguments_are_named():
    model = network()
    head = model.init(jax.random.key(0))["head"]
    with pytest.raises(ValueError, match=r"start: expected a head of shapes .*'kernel': \(3, 3\)"):
        mm.algorithms.memory_reduced(model, start={**head, "kernel": np.ones((3, 4))})
    # under test, annotations are checked before the library's own checks are reached
    with pytest.raises((ValueError, TypeCheckError), match="statistics"):
        head_problem(model, 0.0, False, "running")
    with pytest.raises((ValueError, TypeCheckError), match="initialisation"):
        mm.models.conv4(5, initialisation="orthogonal")

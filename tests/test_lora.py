"""Who adapts: predicates, trees of labels, low-rank adapters; and what the others cost."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memmeta as mm
from memmeta.few_shot import network_problem
from memmeta.models import from_equinox, from_linen, lora, mlp

INPUTS = jax.random.normal(jax.random.key(0), (6, 4))


class Twice(nn.Module):
    """A matrix in two places, one of them transposed, and a table."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(4, 4)
        hidden = jnp.tanh(nn.Dense(5)(x) + embed(jnp.arange(6) % 4) @ jnp.ones((4, 5)))
        return nn.Dense(3)(embed.attend(nn.Dense(4)(hidden)))


NETWORKS = {
    "linen": lambda: from_linen(Twice(), INPUTS),
    "equinox": lambda: from_equinox(lambda key: eqx.nn.MLP(4, 3, 5, 2, key=key), INPUTS),
}


def formed(params):
    """The parameters of the old network that the adapters amount to."""
    found = dict(jax.tree_util.tree_leaves_with_path(params["base"]))
    for path, leaf in found.items():
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in params["lora"]:
            found[path] = leaf + params["lora"][name]["down"] @ params["lora"][name]["up"]
    return jax.tree.unflatten(jax.tree.structure(params["base"]), list(found.values()))


@pytest.mark.parametrize("name", NETWORKS)
def test_adapters_are_matrices_of_low_rank(name):
    """At the start the old network; then that of W + A B, which is never formed."""
    plain = NETWORKS[name]()
    network = lora(plain, rank=1)
    params = network.init(jax.random.key(1))
    before = network.body(params["body"], INPUTS, jnp.ones(6))
    expected = plain.body(plain.init(jax.random.key(1))["body"], INPUTS, jnp.ones(6))
    np.testing.assert_allclose(before, expected, rtol=1e-6)
    adapters = jax.tree.map(lambda x: x + 0.3, params["body"]["lora"])
    moved = {"base": params["body"]["base"], "lora": adapters}
    found = network.body(moved, INPUTS, jnp.ones(6))
    np.testing.assert_allclose(
        found, plain.body(formed(moved), INPUTS, jnp.ones(6)), rtol=1e-4, atol=1e-5
    )
    assert np.any(found != before)


def test_where_chooses_matrices():
    network = lora(mlp(2, (5, 6), (4,)), 2, where=lambda path: path == "Dense_1/kernel")
    assert set(network.init(jax.random.key(0))["body"]["lora"]) == {"Dense_1/kernel"}
    with pytest.raises(ValueError, match=r"where: chooses no matrix, .*Dense_0/kernel"):
        lora(mlp(2, (5, 6), (4,)), 2, where=lambda path: path == "bias")


LABELS = {
    "predicate": lambda path: path.endswith("bias"),
    "tree": {
        "body": {"Dense_0": {"kernel": "shared", "bias": "adapts"}},
        "head": {"kernel": "shared", "bias": "adapts"},
    },
    "upper part": {"body": "shared", "head": "adapts"},
    "one path": {"head": "adapts"},
    "longest path": {"head": "shared", "head/kernel": "adapts", "head/bias": "adapts"},
}


@pytest.mark.parametrize("kind", LABELS)
def test_who_adapts_by_name_or_label(kind):
    network = mlp(2, (5,), (4,))
    params = network.init(jax.random.key(0))
    problem = network_problem(network, LABELS[kind], proximal=0.0)
    sizes = {leaf.shape for leaf in jax.tree.leaves(problem.init(params))}
    assert sizes == ({(5,), (2,)} if kind in ("predicate", "tree") else {(5, 2), (2,)})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"body": "fixed", "head": "adapts"},
            "adapts: expected one of 'adapts', 'shared'",
        ),
        (
            {"head": "adapts", "boddy": "shared"},
            r"adapts: found labels for boddy, .*body/Dense_0/k",
        ),
        ({"body": "shared"}, "chooses no parameter"),
        ({"body": "shared", "head": "shared"}, "chooses no parameter"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        network_problem(mlp(2, (5,), (4,)), labels, proximal=0.0)


@pytest.mark.slow
def test_what_does_not_adapt_takes_no_memory_in_the_inner_state():
    """Stored iterates of an unrolled loop, and one task's share, in compiled bytes."""
    wide = 256
    plain = mlp(2, (wide, wide), (wide,))
    frozen = plain.init(jax.random.key(0))
    matrices = 2 * wide * wide * 4  # bytes

    def temporary(network, steps, tasks):
        inner = mm.InnerLoop(optax.adam(0.01, eps_root=1e-8), steps)
        adapts = "all" if network is plain else lambda path: "lora" in path or "head" in path
        learner = mm.algorithms.maml(network, inner=inner, adapts=adapts)
        step = learner.make_meta_step(optax.sgd(0.1), task_chunk=None)
        state = jax.eval_shape(lambda key: step.init(learner.init(key)), jax.random.key(0))
        inputs, labels = jnp.zeros((tasks, 2, wide)), jnp.zeros((tasks, 2), jnp.int32)
        lowered = jax.jit(step.gradient).lower(state, mm.Task(inputs, labels, inputs, labels))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    shared, apart = lora(plain, rank=1), lora(plain, rank=1, frozen=frozen)
    assert temporary(shared, 6, 2) - temporary(shared, 2, 2) < matrices
    # no task has a matrix of its own
    assert temporary(apart, 1, 8) - temporary(apart, 1, 2) < matrices
    # where all adapt, φ and Adam's two moments are stored at each step of each task
    assert temporary(plain, 6, 2) - temporary(plain, 2, 2) > 4 * 2 * 3 * matrices

"""Modules of other libraries as networks: state, noise, shared weights, embeddings, attention."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memmeta as mm
from memmeta.few_shot import head_problem, network_problem
from memmeta.models import from_equinox, from_haiku, from_linen, from_nnx

INPUTS = jax.random.normal(jax.random.key(0), (6, 4))
TOKENS = {"ids": jnp.arange(12).reshape(3, 4), "mask": jnp.array([[1.0, 1.0, 1.0, 0.0]] * 3)}
RATE = 0.5


class LinenNoisy(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3, name="out")(nn.Dropout(RATE, deterministic=not train)(hidden))


class LinenTokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.Embed(12, 4)(x["ids"])
        there = nn.make_attention_mask(x["mask"] > 0, x["mask"] > 0)
        attend = nn.MultiHeadDotProductAttention(2, dropout_rate=RATE, deterministic=False)
        hidden = hidden + attend(hidden, mask=there)
        shared = nn.Dense(4, name="shared")
        hidden = shared(nn.relu(shared(hidden)))
        return nn.Dense(3, use_bias=False, name="out")((hidden * x["mask"][..., None]).sum(1))


class NnxNoisy(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(RATE, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(self.norm(self.hidden(x))))


class NnxTokens(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 4, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=RATE, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs)] * 2)
        self.out = nnx.Linear(4, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        hidden = self.embed(x["ids"])
        hidden = hidden + self.attend(hidden, mask=x["mask"][:, None, None] > 0)
        for layer in self.layers:
            hidden = nnx.relu(layer(hidden))
        return self.out((hidden * x["mask"][..., None]).sum(1))


class EquinoxNoisy(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        self.hidden, self.out = eqx.nn.Linear(4, 8, key=key), eqx.nn.Linear(8, 3, key=key)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.drop = eqx.nn.Dropout(RATE)

    def __call__(self, x, state, key=None):
        hidden, state = self.norm(self.hidden(x), state)
        return self.out(self.drop(hidden, key=key)), state


class EquinoxTokens(eqx.Module):
    embed: eqx.nn.Embedding
    attend: eqx.nn.MultiheadAttention
    shared: eqx.nn.Linear
    out: eqx.nn.Linear
    activation: object

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(12, 4, key=key)
        self.attend = eqx.nn.MultiheadAttention(2, 4, dropout_p=RATE, key=key)
        self.shared = eqx.nn.Linear(4, 4, key=key)
        self.out = eqx.nn.Linear(4, 3, use_bias=False, key=key)
        self.activation = jax.nn.relu  # a leaf that is no array

    def __call__(self, x, key=None):
        hidden = jax.vmap(self.embed)(x["ids"])
        there = jnp.broadcast_to(x["mask"] > 0, (4, 4))
        hidden = hidden + self.attend(hidden, hidden, hidden, mask=there, key=key)
        for _ in range(2):
            hidden = self.activation(jax.vmap(self.shared)(hidden))
        return self.out((hidden * x["mask"][:, None]).sum(0))


def haiku_noisy(x, is_training):
    hidden = hk.BatchNorm(True, True, 0.9)(hk.Linear(8)(x), is_training)
    if is_training:
        hidden = hk.dropout(hk.next_rng_key(), RATE, hidden)
    return hk.Linear(3, name="out")(hidden)


def haiku_tokens(x, is_training):
    hidden = hk.Embed(12, 4)(x["ids"])
    start = hk.initializers.VarianceScaling(1.0)
    attend = hk.MultiHeadAttention(2, 2, w_init=start, model_size=4)
    hidden = hidden + attend(hidden, hidden, hidden, mask=x["mask"][:, None, None] > 0)
    if is_training:
        hidden = hk.dropout(hk.next_rng_key(), RATE, hidden)
    shared = hk.Linear(4)
    hidden = shared(jax.nn.relu(shared(hidden)))
    return hk.Linear(3, with_bias=False, name="out")((hidden * x["mask"][..., None]).sum(1))


def of_haiku(function, example, **options):
    call = lambda apply, x, key: apply(x, is_training=key is not None)  # noqa: E731
    return from_haiku(hk.transform_with_state(function), example, call=call, **options)


LIBRARIES = {
    "linen": (from_linen, LinenNoisy(), LinenTokens()),
    "nnx": (from_nnx, NnxNoisy, NnxTokens),
    "equinox": (from_equinox, lambda key: eqx.nn.make_with_state(EquinoxNoisy)(key), EquinoxTokens),
    "haiku": (of_haiku, haiku_noisy, haiku_tokens),
}


@functools.cache
def noisy(name):
    """The network with batch normalisation and dropout, and parameters of it."""
    build, module, _ = LIBRARIES[name]
    network = build(module, INPUTS)
    return network, network.init(jax.random.key(1))


@functools.cache
def of_tokens(name):
    build, _, module = LIBRARIES[name]
    network = build(module, TOKENS)
    return network, network.init(jax.random.key(1))


@pytest.mark.parametrize("name", LIBRARIES)
def test_batch_statistics_are_those_of_the_examples_with_weight(name):
    network, params = noisy(name)
    assert (network.features, network.ways) == (8, 3)
    assert network.head is mm.models.linear_head
    weights = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    found = network.body(params["body"], INPUTS, weights)
    np.testing.assert_allclose(found[:4].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found[:4].var(0), 1, atol=1e-2)
    moved = network.body(params["body"], INPUTS.at[5].set(100.0), weights)
    np.testing.assert_allclose(moved[:5], found[:5], atol=1e-5)
    chex.assert_tree_all_finite(network.body(params["body"], INPUTS, jnp.zeros(6)))


@pytest.mark.parametrize("name", LIBRARIES)
def test_noise_is_on_with_a_key_alone(name):
    network, params = noisy(name)
    plain = network.body(params["body"], INPUTS, jnp.ones(6))
    draws = [
        network.body(params["body"], INPUTS, jnp.ones(6), key=jax.random.key(k)) for k in (2, 2, 3)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2])
    dropped = np.asarray(draws[0] == 0)
    assert 0.2 < dropped.mean() < 0.8
    np.testing.assert_allclose(draws[0][~dropped], plain[~dropped] / (1 - RATE), rtol=1e-4)


@pytest.mark.parametrize("name", LIBRARIES)
def test_structured_inputs_attention_and_shared_weights(name):
    network, params = of_tokens(name)
    outputs = network.head(params["head"], network.body(params["body"], TOKENS, jnp.ones(3)))
    assert outputs.shape == (3, 3)
    hidden = TOKENS | {"ids": TOKENS["ids"].at[:, 3].set(0)}  # where the mask is zero
    same = network.head(params["head"], network.body(params["body"], hidden, jnp.ones(3)))
    np.testing.assert_allclose(same, outputs, atol=1e-6)
    one = network.body(params["body"], TOKENS, jnp.ones(3), key=jax.random.key(0))
    two = network.body(params["body"], TOKENS, jnp.ones(3), key=jax.random.key(1))
    assert np.any(one != two)
    names = [
        jax.tree_util.keystr(p, simple=True) for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    squares = [x for x in jax.tree.leaves(params["body"]) if x.shape == (4, 4)]
    assert len(squares) <= 5, names  # the layer that is used twice is there once


@pytest.mark.parametrize("name", LIBRARIES)
def test_head_by_path_by_predicate_and_none(name):
    build, module, _ = LIBRARIES[name]
    expected, params = noisy(name)
    outputs = expected.head(params["head"], expected.body(params["body"], INPUTS, jnp.ones(6)))
    for head in (lambda path: path == "out", None):
        network = build(module, INPUTS, head=head)
        found = network.init(jax.random.key(1))
        features = network.body(found["body"], INPUTS, jnp.ones(6))
        np.testing.assert_allclose(network.head(found["head"], features), outputs, atol=1e-5)
    with pytest.raises(ValueError, match=r"head: found no module 'outt'.*Did you mean 'out'"):
        build(module, INPUTS, head="outt")


def few_shot_tasks(keyed):
    labels = jnp.tile(jnp.arange(3), (2, 2))
    inputs = jax.random.normal(jax.random.key(3), (2, 2, 6, 4))
    extras = {"key": jax.random.split(jax.random.key(4), 2)} if keyed else None
    return mm.Task(inputs[0], labels, inputs[1], labels, extras)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_key_of_a_task_is_that_of_its_passes(name):
    """Both of a method's passes over it draw of it, the same in every inner step."""
    network, params = noisy(name)
    keyed, quiet = (
        jax.tree.map(lambda leaf: leaf[0], few_shot_tasks(keyed)) for keyed in (True, False)
    )
    problem = network_problem(network, "all", proximal=0.0)
    losses = jax.jit(
        lambda t: (
            problem.inner_loss(params, problem.embed(params, t)),
            problem.outer_loss(params, problem.embed(params, t))[0],
        )
    )
    found, again, plain = (np.array(losses(task)) for task in (keyed, keyed, quiet))
    np.testing.assert_array_equal(found, again)
    assert np.all(found != plain)


def test_a_meta_step_with_noise():
    """It runs with the keys among its tasks, and no task is left out."""
    learner = mm.algorithms.anil(noisy("linen")[0], inner=mm.InnerLoop(optax.sgd(0.1), 1))
    step = learner.make_meta_step(optax.sgd(0.1))
    state = step.init(learner.init(jax.random.key(0)))
    _, metrics = jax.jit(step.gradient)(state, few_shot_tasks(True))
    assert metrics.used == 2


def test_outputs_of_any_kind():
    """Two outputs of each example and a loss of one's own; a head that is no linear one."""

    class Gaussian(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"mean": nn.Dense(1)(x)[:, 0], "log_scale": nn.Dense(1)(x)[:, 0]}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Gaussian()(nn.tanh(nn.Dense(5)(x)))

    def loss(outputs, targets):
        scaled = (targets - outputs["mean"]) * jnp.exp(-outputs["log_scale"])
        return 0.5 * scaled**2 + outputs["log_scale"]

    network = from_linen(Model(), INPUTS, head="Gaussian_0")
    tasks = few_shot_tasks(False)
    tasks = tasks._replace(
        support_targets=tasks.support_inputs.sum(-1), query_targets=tasks.query_inputs.sum(-1)
    )
    problem, params = head_problem(network, 0.0, True, loss=loss), network.init(jax.random.key(0))
    context = problem.embed(params, jax.tree.map(lambda leaf: leaf[0], tasks))
    found, aux = problem.outer_loss(params["head"], context)
    assert np.isfinite(found)
    assert aux == {}
    slope = jax.grad(problem.inner_loss)(params["head"], context)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slope))


def test_what_cannot_be_split_is_refused():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(5, 4)
            return embed.attend(nn.Dense(4)(embed(ids).mean(1)))

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 2 * nn.Dense(3)(x)

    for module, example in ((Tied(), TOKENS["ids"] % 5), (Scaled(), INPUTS)):
        with pytest.raises(ValueError, match="the module is not its body followed by 'Dense_0'"):
            from_linen(module, example)
    tied = from_linen(Tied(), TOKENS["ids"] % 5, head=None)
    assert set(tied.init(jax.random.key(0))["body"]) == {"Embed_0", "Dense_0"}


def test_pretrained_running_averages_are_read_where_asked_for():
    module = LinenNoisy()
    variables = module.init(jax.random.key(0), INPUTS, train=False)
    variables["batch_stats"]["BatchNorm_0"]["mean"] += 3.0
    network = from_linen(module, INPUTS, variables=variables, running_averages=True)
    params = network.init(jax.random.key(7))
    features = network.body(params["body"], INPUTS, jnp.ones(6))
    expected = module.apply(variables, INPUTS, train=False)
    np.testing.assert_allclose(network.head(params["head"], features), expected, atol=1e-5)


def test_a_module_with_state_is_no_body_for_with_linear_head():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, weights):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))

    with pytest.raises(ValueError, match=r"body: .*batch_stats.*from_linen"):
        mm.models.with_linear_head(Body(), 3, (4,), 1.0)
    with pytest.raises(ValueError, match=r"body: .*from_linen"):
        mm.models.with_linear_head(nn.Dense(4), 3, (4,), 1.0)

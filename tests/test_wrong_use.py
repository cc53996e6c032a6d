"""What is easily written wrongly is answered with what to write, before anything is compiled."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from typechecker import PLAIN

import memmeta as mm

INPUTS = jnp.ones((4, 3))
TARGETS = jnp.ones((2, 4, 1))
TASKS = mm.Task(jnp.ones((2, 4, 3)), TARGETS, jnp.ones((2, 4, 3)), TARGETS)
NETWORK = mm.models.mlp(1, (5,), (3,))


def first_step(tasks=TASKS, learner=None, **options):
    learner = learner or mm.algorithms.maml(NETWORK, **options)
    step = learner.make_meta_step(optax.sgd(0.1))
    return step(step.init(learner.init(jax.random.key(0))), tasks)


class Cut(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.Dense(4)(x))[:, 0]


class Renamed(nn.Module):
    @nn.compact
    def __call__(self, x, is_train):
        return nn.Dense(1)(x)


class TwoArguments(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, ids, mask):
        return self.out(ids * mask)


class Alone(eqx.Module):
    out: eqx.nn.Linear

    def __init__(self, key):
        self.out = eqx.nn.Linear(3, 1, key=key)

    def __call__(self, ids, mask):
        return self.out(ids * mask)


def dense(x):
    return hk.Linear(1)(hk.Linear(4)(x))


def with_extras(extras):
    return lambda: first_step(TASKS._replace(extras=extras))


def wrong_view():
    view = mm.inner.minibatch(2, of=lambda path: path == "1/rows")
    return view({"rows": INPUTS, "weights": jnp.ones(7)}, jax.random.key(0), jnp.int32(0))


def a_used_state():
    learner = mm.algorithms.maml(NETWORK)
    step = learner.make_meta_step(optax.sgd(0.1))
    state = step.init(learner.init(jax.random.key(0)))
    step(state, TASKS)
    return step(state, TASKS)


CASES = {
    "a loss of [n, 1]": (
        lambda: first_step(loss=optax.huber_loss),
        r"loss: returned float32\[4, 1\], expected float32\[4\], .*\.sum\(-1\)",
    ),
    "a loss of [n, n]": (
        lambda: first_step(
            TASKS._replace(support_targets=TARGETS[..., 0], query_targets=TARGETS[..., 0]),
            loss=optax.huber_loss,
        ),
        r"loss: returned float32\[4, 4\], expected float32\[4\]",
    ),
    "a loss that is one number": (
        lambda: first_step(loss=lambda outputs, targets: jnp.mean((outputs - targets) ** 2)),
        r"loss: returned float32\[\], expected float32\[4\]",
    ),
    "keys under another name": (
        with_extras({"rng": jax.random.split(jax.random.key(0), 2)}),
        r"extras: found PRNG keys at extras\['rng'\], expected them as \{\"key\": keys\}",
    ),
    "keys under no name": (
        with_extras(jax.random.split(jax.random.key(0), 2)),
        r'Write tasks._replace\(extras=\{"key": keys\}\)',
    ),
    "outputs cut after the last layer": (
        lambda: mm.models.from_linen(Cut(), INPUTS),
        r"Something comes after it, such as \[:, 0\] or a softmax: that belongs into the loss",
    ),
    "outputs of one axis": (
        lambda: mm.models.from_linen(Cut(), INPUTS, head=None),
        r"module: its outputs have shape \[4\], expected \[examples, outputs\]",
    ),
    "a flag of another name, linen": (
        lambda: mm.models.from_linen(Renamed(), INPUTS),
        r"'is_train'\. Say how the module is called, for instance by call=",
    ),
    "two arguments, nnx": (
        lambda: mm.models.from_nnx(TwoArguments, INPUTS),
        r"'mask'\. Say how the module is called",
    ),
    "two arguments, equinox": (
        lambda: mm.models.from_equinox(lambda key: Alone(key), INPUTS),
        r"'mask'\. Say how the module is called",
    ),
    "two arguments, haiku": (
        lambda: mm.models.from_haiku(hk.transform(lambda x, mask: dense(x)), INPUTS),
        r"'mask'\. Say how the module is called",
    ),
    "haiku without keys": (
        lambda: mm.models.from_haiku(hk.without_apply_rng(hk.transform(dense)), INPUTS),
        r"transformed: .*without hk.without_apply_rng",
    ),
    "haiku not transformed": (
        lambda: mm.models.from_haiku(dense, INPUTS),
        r"transformed: .*Give what hk.transform\(f\) returns",
    ),
    "frozen parameters of the body alone": (
        lambda: mm.models.lora(NETWORK, 1, frozen=NETWORK.init(jax.random.key(0))["body"]),
        r"frozen: expected shapes .*Give parameters as network.init\(key\) makes them",
    ),
    "frozen parameters of another width": (
        lambda: mm.models.lora(
            NETWORK, 1, frozen=mm.models.mlp(1, (6,), (3,)).init(jax.random.key(0))
        ),
        "frozen: expected shapes",
    ),
    "a view that cuts nothing": (
        wrong_view,
        r"of: chooses leaves with no rows, .*rows \[4, 3\], weights \[7\]",
    ),
    "a state that is used up": (a_used_state, "state: found one that a former call has used up"),
}

UNCHECKED = {
    "θ in place of the state": (
        lambda: mm.algorithms.maml(NETWORK).make_meta_step(optax.sgd(0.1))(
            NETWORK.init(jax.random.key(0)), TASKS
        ),
        r"state: found dict, expected a MetaState\. Begin with state = step.init\(theta\)",
    ),
    "an optimiser in place of the loop": (
        lambda: mm.algorithms.imaml(NETWORK, inner=optax.sgd(0.1)),
        r"inner: expected a memmeta.InnerLoop.*Write memmeta.InnerLoop\(optax.sgd\(0.1\)\)",
    ),
}
"""What annotations catch where they are checked, and the library itself where they are not."""


@pytest.mark.parametrize("name", [*CASES, *(UNCHECKED if PLAIN else ())])
def test_it_is_said_what_to_write(name):
    call, message = (CASES | UNCHECKED)[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_loss_of_ones_own_is_a_mean_over_examples():
    """Ten times as many query examples that are all alike change nothing."""

    def huber(outputs, targets):
        return optax.huber_loss(outputs, targets).sum(-1)

    def losses(count):
        inputs, targets = jnp.ones((1, count, 3)), 2 * jnp.ones((1, count, 1))
        _, metrics = first_step(mm.Task(inputs, targets, inputs, targets), loss=huber)
        return metrics.loss

    assert jnp.allclose(losses(2), losses(20), rtol=1e-5)

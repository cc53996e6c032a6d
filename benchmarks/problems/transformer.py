"""A causal transformer that reads points of a function, and the functions that are its tasks.

A task is a function, a sum of waves. An example is a sequence of points on it: at each x the
network says y, from the points before it (in context) and from what its low-rank adapters have
learned of this function (in the inner loop). All is drawn from a key; nothing is downloaded.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

import memmeta as mm
from memmeta.few_shot.algorithms import Learner
from memmeta.models import Network
from memmeta.problem import MetaParams, Scalar, Task

HEAD_WIDTH, MLP_RATIO = 32, 4
WAVES, NOISE = 3, 0.1
SCALE, PROXIMAL, CG_STEPS = 4.0, 1.0, 5
RATE, MOMENTUM = 0.03, 0.9
ADAPTERS = "body/lora/"

Rule: TypeAlias = Literal["implicit", "unrolled"]
RULES: tuple[Rule, ...] = get_args(Rule)


class Block(nn.Module):
    """Causal self-attention, then two dense layers; each on normalised inputs, added to them.

    Queries, keys and values have matrices of two axes, beside which `lora` can put adapters.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        heads = max(1, self.width // HEAD_WIDTH)
        split = (*x.shape[:-1], heads, self.width // heads)
        normal = nn.LayerNorm()(x)
        query, key, value = (
            nn.Dense(self.width, name=name)(normal).reshape(split)
            for name in ("query", "key", "value")
        )
        mask = nn.make_causal_mask(x[..., 0])
        read = nn.dot_product_attention(query, key, value, mask=mask).reshape(x.shape)
        x = x + nn.Dense(self.width, name="out")(read)
        hidden = nn.gelu(nn.Dense(MLP_RATIO * self.width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width, name="down")(hidden)


class Transformer(nn.Module):
    """Tokens [sequences, points, 3] -> the answer at each point [sequences, points, 1]."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        shape = (tokens.shape[-2], self.width)
        places = self.param("places", nn.initializers.normal(0.02), shape, jnp.float32)
        x = nn.Dense(self.width)(tokens) + places
        for _ in range(self.layers):
            x = Block(self.width)(x)
        return nn.Dense(1)(nn.LayerNorm()(x))


@dataclass(frozen=True)
class Functions:
    """Sums of waves of random frequency, phase and size.

    Attributes:
        support: sequences to adapt on.
        query: sequences to be judged by.
        points: of a sequence.
    """

    support: int = 4
    query: int = 4
    points: int = 16

    def sample(self, key: Key[Array, ""]) -> Task:
        """One task: tokens (x_i, x_{i−1}, y_{i−1}), whose answers are the y_i, with noise."""
        keys = jax.random.split(key, 5)
        frequency = jax.random.uniform(keys[0], (WAVES,), minval=0.5, maxval=3.0)
        phase = jax.random.uniform(keys[1], (WAVES,), maxval=2 * jnp.pi)
        size = (2 / WAVES) ** 0.5 * jax.random.normal(keys[2], (WAVES,))
        shape = (self.support + self.query, self.points)
        x = jax.random.uniform(keys[3], shape, minval=-2.0, maxval=2.0)
        y = jnp.sin(x[..., None] * frequency + phase) @ size
        y = y + NOISE * jax.random.normal(keys[4], shape)
        before = [jnp.pad(values[:, :-1], ((0, 0), (1, 0))) for values in (x, y)]
        tokens = jnp.stack([x, *before], axis=-1)
        first = self.support
        return Task(tokens[:first], y[:first], tokens[first:], y[first:])

    def sample_batch(self, key: Key[Array, ""], tasks: int) -> Task:
        """Tasks, with a leading axis."""
        return jax.vmap(self.sample)(jax.random.split(key, tasks))


def losses(outputs: Float[Array, "n points 1"], targets: Float[Array, "n points"]) -> Array:
    """The mean squared error of each sequence."""
    return jnp.mean((outputs[..., 0] - targets) ** 2, axis=-1)


def transformer(layers: int, width: int, points: int) -> Network:
    """The network, its last layer as the head."""
    tokens: Any = jax.ShapeDtypeStruct((2, points, 3), jnp.float32)
    return mm.models.from_linen(Transformer(layers, width), tokens)


def with_adapters(network: Network, rank: int) -> Network:
    """Low-rank matrices beside those of every block."""
    return mm.models.lora(network, rank, lambda path: "Block" in path, scale=SCALE)


def learner(network: Network, rule: Rule, steps: int, proximal: float = PROXIMAL) -> Learner:
    """The adapters adapt, held to θ; θ is all: matrices, adapters' start and head.

    Both rules have the same problem and the same inner loop.
    """
    made = mm.algorithms.imaml(
        network,
        inner=mm.InnerLoop(optax.sgd(RATE, momentum=MOMENTUM), steps),
        proximal=proximal,
        cg_steps=CG_STEPS,
        adapts=lambda path: path.startswith(ADAPTERS),
        loss=losses,
    )
    return made if rule == "implicit" else replace(made, estimator=mm.hypergradient.unrolled())


def plain_loss(network: Network, params: MetaParams, tasks: Task) -> Scalar:
    """The mean squared error on all sequences of all tasks, as of one labelled batch."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tasks)
    tokens = jnp.concatenate([flat.support_inputs, flat.query_inputs])
    targets = jnp.concatenate([flat.support_targets, flat.query_targets])
    features = network.body(params["body"], tokens, jnp.ones(len(tokens)))
    return jnp.mean(losses(network.head(params["head"], features), targets))

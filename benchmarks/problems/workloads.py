"""Few-shot workloads of the sizes that papers use: tasks, networks, methods by name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import memmeta as mm
from benchmarks.harness.programs import compiled
from memmeta.few_shot.algorithms import METHODS, Learner
from memmeta.hypergradient import implicit, mixed_mode, unrolled
from memmeta.linear_solve import cg
from memmeta.models import Network, conv4
from memmeta.problem import Batch, Task

RATE = 0.01
RIDGE, PROXIMAL, CG_STEPS = 0.1, 2.0, 5
"""Inner rate where it must be the same in all libraries; small, so that rounding stays rounding."""

Options: TypeAlias = dict[str, Any]


class Workload(NamedTuple):
    """A meta-step's data and network."""

    tasks: int = 4
    ways: int = 5  # classes in a task
    shots: int = 1  # support images a class
    queries: int = 15  # query images a class
    image_shape: tuple[int, int, int] = (28, 28, 1)  # height, width, channels
    width: int = 64  # filters of each block
    depth: int = 4  # blocks

    @property
    def images(self) -> int:
        """In one task."""
        return self.ways * (self.shots + self.queries)

    @property
    def convolution_flops(self) -> float:
        """Of one supervised gradient on all images by direct convolution.

        Forwards, kernels' gradients, and images' gradients of all blocks but the first.
        """
        height, width, channels = self.image_shape
        total = 0.0
        for block in range(self.depth):
            each = 2.0 * height * width * 9 * channels * self.width
            total += each * (3 if block else 2)
            height, width, channels = height // 2, width // 2, self.width
        return total * self.images * self.tasks

    def network(self, **options: Any) -> Network:
        """The Conv4 of this width; its head starts at random where a method learns the start."""
        sizes: Options = {"width": self.width, "depth": self.depth}
        options = {"image_shape": self.image_shape, "head_scale": 1.0, **sizes, **options}
        return conv4(self.ways, **options)

    def shapes(self) -> Batch:
        """The batch of tasks without its data, to compile for."""
        return jax.eval_shape(self.batch)

    def batch(self) -> Batch:
        """Random images, each class around a random image of its own, as float32."""
        support, query = self.ways * self.shots, self.ways * self.queries
        noise, centres = jax.random.split(jax.random.key(7))
        shape = (self.tasks, support + query, *self.image_shape)
        labels = jnp.arange(support + query, dtype=jnp.int32) % self.ways
        labels = jnp.tile(labels, (self.tasks, 1))
        kinds = jax.random.normal(centres, (self.tasks, self.ways, *self.image_shape))
        images = jnp.take_along_axis(kinds, labels[..., None, None, None], axis=1)
        images = 0.5 + 0.1 * images + 0.2 * jax.random.normal(noise, shape)
        return Task(
            images[:, :support], labels[:, :support], images[:, support:], labels[:, support:]
        )


PAPERS_OMNIGLOT = Workload()
PAPERS_CIFAR = Workload(tasks=32, shots=5, queries=5, image_shape=(32, 32, 3))
PAPERS_IMAGENET = PAPERS_CIFAR._replace(image_shape=(84, 84, 3), width=32)
WORKLOADS = {"a": PAPERS_OMNIGLOT, "b32": PAPERS_CIFAR, "b84": PAPERS_IMAGENET}
"""By the letters of `docs/performance.md`."""

OPTIONS: dict[str, Options] = {
    "imaml": {"proximal": PROXIMAL, "cg_steps": CG_STEPS},
    "memory_reduced": {"ridge": RIDGE},
}
"""Of methods, where they must be the same in all libraries."""


def learner(network: Network, method: str, steps: int, **options: Any) -> Learner:
    """A method of `METHODS` or `VARIANTS`, with T = `steps` of gradient descent inside."""
    if method in VARIANTS:
        return VARIANTS[method](network, steps)
    named: Mapping[Any, Callable[..., Learner]] = METHODS
    inner = mm.InnerLoop(optax.sgd(RATE), steps)
    return named[method](network, inner=inner, **(OPTIONS.get(method, {}) | options))


def _maml_by(estimator: Any) -> Callable[..., Learner]:
    return lambda network, steps: replace(learner(network, "maml", steps), estimator=estimator)


def _recomputed(method: str) -> Callable[..., Learner]:
    return lambda network, steps: learner(network, method, steps, recompute_features=True)


def _memory_reduced_recomputed(network: Network, steps: int) -> Learner:
    """The implicit rule with the body run in each inner step, as the paper's code does."""
    usual = learner(network, "memory_reduced", steps)
    problem = learner(network, "itd_bio, recomputed", steps).problem

    def inner_loss(head: Any, context: Any) -> jax.Array:
        ridge = sum((jnp.sum(x**2) for x in jax.tree.leaves(head)), jnp.float32(0))
        return problem.inner_loss(head, context) + RIDGE / 2 * ridge

    return replace(usual, problem=replace(problem, inner_loss=inner_loss))


def _imaml_without_estimate(network: Network, steps: int) -> Learner:
    """As other libraries: no estimate of the hypergradient's error."""
    estimator = implicit(cg(CG_STEPS), estimate_error=False)
    return replace(learner(network, "imaml", steps), estimator=estimator)


VARIANTS: dict[str, Callable[..., Learner]] = {
    "maml, remat by step": _maml_by(unrolled("step")),
    "maml, remat by root": _maml_by(unrolled("sqrt")),
    "maml, mixed mode": _maml_by(mixed_mode()),
    "imaml, no estimate": _imaml_without_estimate,
    "anil, recomputed": _recomputed("anil"),
    "itd_bio, recomputed": _recomputed("itd_bio"),
    "memory_reduced, recomputed": _memory_reduced_recomputed,
}
"""Methods in another form that is measured too."""


def spread(tasks: Batch, mesh: Mesh | None) -> Batch:
    """A batch whose tasks are shared out to the devices of a mesh; None leaves it where it is."""
    if mesh is None:
        return tasks
    return jax.device_put(tasks, NamedSharding(mesh, PartitionSpec("tasks")))


def meta_step(made: Learner, chunk: Any, mesh: Mesh | None = None) -> mm.MetaStep:
    """One outer iteration with Adam."""
    return made.make_meta_step(optax.adam(1e-3), task_chunk=chunk, mesh=mesh)


def compiled_step(
    made: Learner, workload: Workload, chunk: int | None, quick: bool = True
) -> jax.stages.Compiled:
    """The meta-step's program for a workload's shapes."""
    step = meta_step(made, chunk)
    state = jax.eval_shape(lambda: step.init(made.init(jax.random.key(0))))
    return compiled(step.update, state, workload.shapes(), quick=quick)


def supervised(network: Network, workload: Workload) -> jax.stages.Compiled:
    """The program of one plain gradient on the images of all tasks, as of one labelled batch."""

    def gradient(params: Any, tasks: Task) -> Any:
        def loss(params: Any) -> jax.Array:
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tasks)
            images = jnp.concatenate([flat.support_inputs, flat.query_inputs])
            labels = jnp.concatenate([flat.support_targets, flat.query_targets])
            features = network.body(params["body"], images, jnp.ones(len(images)))
            logits = network.head(params["head"], features)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    params = jax.eval_shape(network.init, jax.random.key(0))
    return compiled(gradient, params, workload.shapes())

"""Meta-steps in plain PyTorch with all tasks at once: `torch.func.vmap`, functorch as it was."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from benchmarks.peers.pytorch import Conv4, Data, Tree, cg
from benchmarks.problems.workloads import RATE, RIDGE


def maml(net: Conv4, tasks: Data, steps: int) -> Tensor:
    """The query losses after the inner steps, with their gradients' sum added to `grad`."""

    def loss(params: Any, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, images), labels)

    def adapted_loss(params: Any, task: Data) -> Tensor:
        for _ in range(steps):
            slope = grad(loss)(params, task.support, task.support_labels)
            params = {name: p - RATE * slope[name] for name, p in params.items()}
        return loss(params, task.query, task.query_labels)

    losses = vmap(adapted_loss, in_dims=(None, 0))(dict(net.named_parameters()), tasks)
    losses.sum().backward()
    return losses


def memory_reduced(net: Conv4, tasks: Data, steps: int) -> Tensor:
    """A linear head from zero on features computed once, by the implicit function theorem."""
    images = torch.cat([tasks.support, tasks.query], 1)
    support, query = vmap(net.body)(images).tensor_split([tasks.support.shape[1]], dim=1)
    zero = [torch.zeros_like(net.head.weight), torch.zeros_like(net.head.bias)]

    def f(head: Tree, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, *head), labels)

    def g(head: Tree, features: Tensor, labels: Tensor) -> Tensor:
        return f(head, features, labels) + 0.5 * RIDGE * sum((x * x).sum() for x in head)

    def solved(task: Data) -> tuple[Tree, Tree]:
        """φ after the inner steps, and v with [∂²_φφ g] v = ∂_φ f."""
        phi = zero
        slope = lambda head: grad(g)(head, task.support, task.support_labels)  # noqa: E731
        for _ in range(steps):
            phi = [p - RATE * d for p, d in zip(phi, slope(phi), strict=True)]
        right = grad(f)(phi, task.query, task.query_labels)
        return phi, cg(lambda p: jvp(slope, (phi,), (p,))[1], right, 20)

    def to_differentiate(phi: Tree, v: Tree, task: Data) -> tuple[Tensor, Tensor]:
        loss = f(phi, task.query, task.query_labels)
        inner = grad(g)(phi, task.support, task.support_labels)
        return loss, loss - sum((d * x).sum() for d, x in zip(inner, v, strict=True))

    features = tasks._replace(support=support, query=query)
    with torch.no_grad():
        phi, v = vmap(solved)(features)
    losses, total = vmap(to_differentiate)(phi, v, features)
    total.sum().backward(inputs=[p for n, p in net.named_parameters() if "head" not in n])
    return losses


METHODS: dict[str, Callable[[Conv4, Data, int], Tensor]] = {
    "maml": maml,
    "memory_reduced": memory_reduced,
}
"""All tasks of a meta-step each, by the names of `benchmarks.problems.workloads`."""

"""Meta-steps in plain PyTorch, written from the papers: what every library on it costs at least.

Features are computed as in `memmeta.few_shot`: of support and query together where they are cached,
of each by itself where they are recomputed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.problems.workloads import CG_STEPS, PROXIMAL, RATE, RIDGE

Tree: TypeAlias = list[Tensor]


class Data(NamedTuple):
    """The tasks of a meta-step: support and query images and labels, each with a leading axis."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


class Conv4(nn.Module):
    """Four blocks of convolution, batch norm by the batch's own statistics, ReLU, max pool."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        names = sorted(params["body"])
        shapes = [params["body"][name]["kernel"].shape for name in names]
        self.convs = nn.ModuleList(
            [nn.Conv2d(s[2], s[3], 3, padding=1, bias=False) for s in shapes]
        )
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(s[3], track_running_stats=False) for s in shapes]
        )
        kernel = params["head"]["kernel"]
        self.head = nn.Linear(*kernel.shape)
        side = round((kernel.shape[0] / shapes[-1][3]) ** 0.5)
        with torch.no_grad():
            for name, conv, norm in zip(names, self.convs, self.norms, strict=True):
                block = {key: torch.tensor(np.array(x)) for key, x in params["body"][name].items()}
                conv.weight.copy_(block["kernel"].permute(3, 2, 0, 1))
                norm.weight.copy_(block["scale"])
                norm.bias.copy_(block["bias"])
            # flattened by channels first here, by channels last there
            ordered = torch.tensor(np.array(kernel)).reshape(side, side, -1, kernel.shape[1])
            self.head.weight.copy_(ordered.permute(2, 0, 1, 3).flatten(0, 2).T)
            self.head.bias.copy_(torch.tensor(np.array(params["head"]["bias"])))

    def body(self, images: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            images = F.max_pool2d(F.relu(norm(conv(images))), 2)
        return images.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def device() -> torch.device:
    """The GPU where JAX works on one, else the CPU."""
    return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")


def data(tasks: Any, channels_last: bool) -> Data:
    """The batch of `Workload.batch` as tensors."""

    def images(x: Any) -> Tensor:
        tensor = torch.tensor(np.array(x)).permute(0, 1, 4, 2, 3)
        return (tensor if channels_last else tensor.contiguous()).to(device())

    def labels(y: Any) -> Tensor:
        return torch.tensor(np.array(y)).long().to(device())

    return Data(
        images(tasks.support_inputs),
        labels(tasks.support_targets),
        images(tasks.query_inputs),
        labels(tasks.query_targets),
    )


def maml(net: Conv4, task: Data, steps: int, first_order: bool = False) -> Tensor:
    """The query loss after the inner steps, with its gradient added to the parameters' `grad`."""
    params = dict(net.named_parameters())
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(net, params, task.support), task.support_labels)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
        params = {n: p - RATE * g for (n, p), g in zip(params.items(), grads, strict=True)}
    loss = F.cross_entropy(functional_call(net, params, task.query), task.query_labels)
    loss.backward()
    return loss


def fomaml(net: Conv4, task: Data, steps: int) -> Tensor:
    return maml(net, task, steps, first_order=True)


def heads(learned: bool, cached: bool, implicit: bool) -> Callable[[Conv4, Data, int], Tensor]:
    """ANIL, ITD-BiO and the paper's method: only a linear head adapts, from a start.

    Features are `cached`, or computed in every inner step; the gradient is by the implicit function
    theorem, or through the steps.
    """
    ridge = RIDGE if implicit else 0.0

    def g(head: Tree, features: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(F.linear(features, *head), labels)
        return loss + 0.5 * ridge * sum((x * x).sum() for x in head) if ridge else loss

    def method(net: Conv4, task: Data, steps: int) -> Tensor:
        support = query = None
        if cached:
            both = net.body(torch.cat([task.support, task.query]))
            support, query = both[: len(task.support)], both[len(task.support) :]
        phi = [net.head.weight, net.head.bias]
        if not learned:
            phi = [torch.zeros_like(x, requires_grad=True) for x in phi]
        for _ in range(steps):
            features = net.body(task.support) if support is None else support
            if implicit and cached:
                features = features.detach()
            loss = g(phi, features, task.support_labels)
            grads = torch.autograd.grad(loss, phi, create_graph=not implicit)
            phi = [p - RATE * d for p, d in zip(phi, grads, strict=True)]
            if implicit:
                phi = [p.detach().requires_grad_() for p in phi]
        query = net.body(task.query) if query is None else query
        loss = F.cross_entropy(F.linear(query, *phi), task.query_labels)
        if implicit:
            support = net.body(task.support) if support is None else support
            implicit_backward(net, loss, phi, lambda x: g(phi, x, task.support_labels), support)
        else:
            loss.backward()
        return loss

    return method


def implicit_backward(
    net: Conv4, loss: Tensor, phi: Tree, g: Callable[[Tensor], Tensor], support: Tensor
) -> None:
    """Add ∂f − ∂²_θφ g · v to the body's `grad`, where [∂²_φφ g] v = ∂_φ f by 20 steps of CG."""
    slope = torch.autograd.grad(loss, phi, retain_graph=True)
    grads = torch.autograd.grad(g(support.detach()), phi, create_graph=True)
    v = cg(lambda p: torch.autograd.grad(grads, phi, p, retain_graph=True), slope, 20)
    inner = torch.autograd.grad(g(support), phi, create_graph=True)
    mixed = sum((d * x).sum() for d, x in zip(inner, v, strict=True))
    (loss - mixed).backward(inputs=[p for n, p in net.named_parameters() if "head" not in n])


def imaml(net: Conv4, task: Data, steps: int) -> Tensor:
    """Everything adapts, held to its start; the gradient is λ (∂²ℓ + λ)⁻¹ ∂f."""
    theta = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]

    def g(phi: Tree) -> Tensor:
        out = functional_call(net, dict(zip(names, phi, strict=True)), task.support)
        pull = sum(((p - t.detach()) ** 2).sum() for p, t in zip(phi, theta, strict=True))
        return F.cross_entropy(out, task.support_labels) + 0.5 * PROXIMAL * pull

    phi = [t.detach().clone().requires_grad_() for t in theta]
    for _ in range(steps):
        grads = torch.autograd.grad(g(phi), phi)
        phi = [(p - RATE * d).detach().requires_grad_() for p, d in zip(phi, grads, strict=True)]
    out = functional_call(net, dict(zip(names, phi, strict=True)), task.query)
    loss = F.cross_entropy(out, task.query_labels)
    slope = torch.autograd.grad(loss, phi)
    grads = torch.autograd.grad(g(phi), phi, create_graph=True)
    v = cg(lambda p: torch.autograd.grad(grads, phi, p, retain_graph=True), slope, CG_STEPS)
    for parameter, x in zip(theta, v, strict=True):
        parameter.grad = PROXIMAL * x + (0 if parameter.grad is None else parameter.grad)
    return loss


def cg(product: Callable[[Tree], Any], right: Any, steps: int) -> Tree:
    """So many conjugate-gradient steps from zero."""
    x = [torch.zeros_like(b) for b in right]
    r, p = list(right), list(right)
    square = _dot(r, r)
    for _ in range(steps):
        image = product(p)
        rate = square / _dot(p, image).clamp_min(1e-30)
        x = [a + rate * b for a, b in zip(x, p, strict=True)]
        r = [a - rate * b for a, b in zip(r, image, strict=True)]
        square, before = _dot(r, r), square
        p = [a + square / before.clamp_min(1e-30) * b for a, b in zip(r, p, strict=True)]
    return x


def _dot(a: Any, b: Any) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


METHODS: dict[str, Callable[[Conv4, Data, int], Tensor]] = {
    "maml": maml,
    "fomaml": fomaml,
    "imaml": imaml,
    "anil": heads(learned=True, cached=True, implicit=False),
    "anil, recomputed": heads(learned=True, cached=False, implicit=False),
    "itd_bio": heads(learned=False, cached=True, implicit=False),
    "itd_bio, recomputed": heads(learned=False, cached=False, implicit=False),
    "memory_reduced": heads(learned=False, cached=True, implicit=True),
    "memory_reduced, recomputed": heads(learned=False, cached=False, implicit=True),
}
"""One task each, by the names of `benchmarks.problems.workloads`."""


def meta_step(
    method: Callable[[Conv4, Data, int], Tensor],
    params: Any,
    tasks: Any,
    steps: int,
    last: bool = False,
    together: bool = False,
    compiled: bool = False,
) -> Callable[[], tuple[float, float]]:
    """A function that makes one meta-step with Adam: (mean query loss, gradient norm).

    Parameters and tasks are those of JAX; `last`: images are stored with channels last; `together`:
    the method takes all tasks at once and returns their losses; `compiled`: the network is, by
    `torch.compile`.
    """
    net, batch = Conv4(params).to(device()), data(tasks, last)
    if last:
        net = net.to(memory_format=torch.channels_last)
    if compiled:
        net.body, net.forward = torch.compile(net.body), torch.compile(net.forward)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    count = len(batch.support)

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        each = [batch] if together else [Data(*(x[i] for x in batch)) for i in range(count)]
        losses = [method(net, some, steps).detach() for some in each]
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        for grad in grads:
            grad /= count
        square = sum(float((grad * grad).sum()) for grad in grads)
        optimizer.step()
        return float(torch.stack(losses).mean()), square**0.5

    return step

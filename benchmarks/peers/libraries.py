"""The same task of MAML through the libraries on PyTorch, as far as they are installed."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.pytorch import Conv4, Data
from benchmarks.problems.workloads import RATE


def _loss(net: Any, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images), labels)


def higher(first_order: bool) -> Callable[[Conv4, Data, int], Tensor]:
    """Its differentiable copies of modules and optimisers."""
    library: Any = importlib.import_module("higher")

    def method(net: Conv4, task: Data, steps: int) -> Tensor:
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        options = {"copy_initial_weights": False, "track_higher_grads": not first_order}
        with library.innerloop_ctx(net, optimizer, **options) as (copy, inner):
            for _ in range(steps):
                inner.step(_loss(copy, task.support, task.support_labels))
            loss = _loss(copy, task.query, task.query_labels)
            if not first_order:
                loss.backward()
                return loss
            # its documented way to first order: the gradient at the end belongs to the start
            grads = torch.autograd.grad(loss, list(copy.parameters()))
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            parameter.grad = grad + (0 if parameter.grad is None else parameter.grad)
        return loss

    return method


def torchopt() -> Callable[[Conv4, Data, int], Tensor]:
    """Its in-place differentiable SGD on the module."""
    library: Any = importlib.import_module("torchopt")

    def method(net: Conv4, task: Data, steps: int) -> Tensor:
        inner = library.MetaSGD(net, lr=RATE)
        start = library.extract_state_dict(net, by="reference")
        for _ in range(steps):
            inner.step(_loss(net, task.support, task.support_labels))
        loss = _loss(net, task.query, task.query_labels)
        loss.backward()
        library.recover_state_dict(net, start)
        return loss

    return method


def torch_maml() -> Callable[[Conv4, Data, int], Tensor]:
    """Its naive MAML."""
    library: Any = importlib.import_module("torch_maml")

    def loss_of(net: Any, batch: Any, **_: Any) -> Tensor:
        return _loss(net, *batch)

    def method(net: Conv4, task: Data, steps: int) -> Tensor:
        optimizer = library.IngraphGradientDescent(learning_rate=RATE)
        learner = library.NaiveMAML(net, loss_of, optimizer=optimizer)
        batch = (task.support, task.support_labels)
        updated = learner([batch] * steps, opt_kwargs={})[0]
        loss = _loss(updated, task.query, task.query_labels)
        loss.backward()
        return loss

    return method


def available() -> tuple[dict[str, dict[str, Callable]], list[str]]:
    """Method -> library -> its function of one task; and a line for each that cannot be used."""
    wanted: dict[str, Callable[[], dict[str, Callable]]] = {
        "higher": lambda: {"maml": higher(False), "fomaml": higher(True)},
        "torchopt": lambda: {"maml": torchopt()},
        "torch_maml": lambda: {"maml": torch_maml()},
    }
    found: dict[str, dict[str, Callable]] = {}
    missing = []
    for name, make in wanted.items():
        try:
            for method, function in make().items():
                found.setdefault(method, {})[name] = function
        except Exception as error:  # a library may fail to import in any way it likes
            missing.append(f"{name}: left out ({type(error).__name__}: {error})")
    return found, missing

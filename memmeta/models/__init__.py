"""Networks: the interface `Network`, and the networks of the few-shot papers."""

from memmeta.models._build import linear_head, with_linear_head
from memmeta.models._conv4 import conv4
from memmeta.models._mlp import mlp
from memmeta.models._network import Network
from memmeta.models._resnet12 import resnet12

__all__ = ["Network", "conv4", "linear_head", "mlp", "resnet12", "with_linear_head"]

"""Networks: the `Network` seam, and the few-shot papers' own."""

from memmeta.models.build import linear_head, with_linear_head
from memmeta.models.conv4 import conv4
from memmeta.models.mlp import mlp
from memmeta.models.network import Network
from memmeta.models.resnet12 import resnet12

__all__ = ["Network", "conv4", "linear_head", "mlp", "resnet12", "with_linear_head"]

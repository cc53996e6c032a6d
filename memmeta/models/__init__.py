"""Networks: the interface `Network`, modules of other libraries, and the few-shot papers' own."""

from memmeta._shared.readable import readable
from memmeta.models._build import linear_head, with_linear_head
from memmeta.models._conv4 import conv4
from memmeta.models._from_equinox import from_equinox
from memmeta.models._from_haiku import from_haiku
from memmeta.models._from_linen import from_linen
from memmeta.models._from_nnx import from_nnx
from memmeta.models._lora import lora
from memmeta.models._mlp import mlp
from memmeta.models._network import Network
from memmeta.models._resnet12 import resnet12

__all__ = [
    "Network",
    "conv4",
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "linear_head",
    "lora",
    "mlp",
    "resnet12",
    "with_linear_head",
]

readable(__name__)

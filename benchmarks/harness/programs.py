"""What programs need, do and send, read from them as compiled or as traced."""

import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from jax.extend.core import jaxprs_in_params

T = TypeVar("T")
CONVOLUTION, KERNEL_GRADIENT = "memmeta_convolution", "memmeta_kernel_gradient"
"""Names of the library's own primitives in a traced program."""
MESSAGE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    r"|collective-broadcast)(?:-start)?\("
)
INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?[\w.-]+ = ", re.MULTILINE)
ARRAY = re.compile(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


def compiled(function: Callable, *arguments: Any, quick: bool = True) -> jax.stages.Compiled:
    """Compile for arguments that may be shapes alone.

    Args:
        function: pure, or a `jax.jit` of one, whose donated arguments stay donated.
        arguments: arrays or their shapes.
        quick: save the seconds that machine code of good quality costs; buffers stay the same.
    """
    options: dict[str, Any] = {"xla_backend_optimization_level": 0} if quick else {}
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*arguments).compile(options)


def temporary_megabytes(program: jax.stages.Compiled) -> float:
    """MB of the program's buffers beside its arguments and results."""
    analysis: Any = program.memory_analysis()
    return float(analysis.temp_size_in_bytes) / 1e6


def flops(program: jax.stages.Compiled) -> float:
    """As the compiler counts them: a loop's body once."""
    analysis: Any = program.cost_analysis()
    return float(analysis["flops"])


def instructions(program: jax.stages.Compiled) -> int:
    """Of the optimised program, in all of its computations."""
    return len(INSTRUCTION.findall(program.as_text() or ""))


def two_at_a_time(calls: dict[Any, Callable[[], T]]) -> dict[Any, T]:
    """The results of calls that mostly compile, which takes one core each."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(calls, pool.map(lambda call: call(), calls.values()), strict=True))


def equations(jaxpr: Any, rounds: int) -> Iterator[tuple[Any, int]]:
    """All equations of a traced program, inner ones too, and how often each is run.

    Args:
        jaxpr: of the program.
        rounds: of a loop whose length the trace does not show.
    """
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        repeats = {"scan": params.get("length"), "while": rounds}.get(name) or 1
        for inside in jaxprs_in_params(params):
            for inner, times in equations(inside, rounds):
                yield inner, repeats * times
        yield equation, 1


def product_flops(equation: Any) -> float:
    """FLOPs of an equation that is a matrix product or a convolution, else 0."""
    name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars]
    out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        return 2.0 * out * math.prod(shapes[0][axis] for axis in contracted)
    if name == CONVOLUTION:  # each number of y: rows · columns · channels
        return 2.0 * out * math.prod(shapes[1][1:4])
    if name == KERNEL_GRADIENT:  # each number of dK: examples · height · width
        return 2.0 * out * math.prod(shapes[0][1:4])
    return 0.0


def collectives(program: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Name and bytes of each message between devices in a compiled program."""
    found = []
    for kind, name in MESSAGE.findall(program.as_text() or ""):
        arrays = [(int(bits or 8), shape) for bits, shape in ARRAY.findall(kind)]
        sizes = [bits // 8 * math.prod(map(int, filter(None, s.split(",")))) for bits, s in arrays]
        found.append((name, sum(sizes)))
    return found

"""Systems with a linear head's Hessian, solved as cheaply as the size of its support allows."""

from typing import Any

from memmeta.linear_solve import LinearSolution, cg, woodbury
from memmeta.linear_solve._solution import Product, Vector
from memmeta.problem import Context, Problem

DENSE = 512
"""Up to so many outputs on the support a matrix of their square is written out: 1 MB in float32."""

STEPS = 50
"""Of conjugate gradients, beyond that."""


def head_solver(
    product: Product, b: Vector, *, problem: Problem, context: Context, **where: Any
) -> LinearSolution:
    """`Structure.solver` of a linear head: `woodbury` where that is small, else `cg`."""
    assert problem.structure.head is not None
    samples = problem.structure.head(context).features.shape[0]
    solver = woodbury() if samples * b["bias"].size <= DENSE else cg(STEPS)
    return solver(product, b, problem=problem, context=context, **where)

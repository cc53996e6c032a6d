"""Matrix-free solvers of A x = b for a symmetric A, that say how they ended: one file each."""

from collections.abc import Callable

from memmeta.linear_solve.cg import cg
from memmeta.linear_solve.direct import direct
from memmeta.linear_solve.jacobi import jacobi
from memmeta.linear_solve.minres import minres
from memmeta.linear_solve.neumann import neumann
from memmeta.linear_solve.solution import LinearSolution, LinearSolver, SolverAt, explain
from memmeta.linear_solve.woodbury import woodbury

SOLVERS: dict[str, Callable[..., LinearSolver | SolverAt]] = {
    "cg": cg,
    "direct": direct,
    "minres": minres,
    "neumann": neumann,
    "woodbury": woodbury,
}
"""Every solver, by name; the shared conformance test runs over this list."""

__all__ = [
    "SOLVERS",
    "LinearSolution",
    "LinearSolver",
    "SolverAt",
    "cg",
    "direct",
    "explain",
    "jacobi",
    "minres",
    "neumann",
    "woodbury",
]

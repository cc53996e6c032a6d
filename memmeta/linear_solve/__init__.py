"""Matrix-free solvers of A x = b for a symmetric A, that say how they ended: one file each."""

from collections.abc import Callable

from memmeta.linear_solve._cg import cg
from memmeta.linear_solve._direct import direct
from memmeta.linear_solve._jacobi import jacobi
from memmeta.linear_solve._minres import minres
from memmeta.linear_solve._neumann import neumann
from memmeta.linear_solve._solution import LinearSolution, LinearSolver, explain, make_solver
from memmeta.linear_solve._spectrum import extreme_eigenvalues
from memmeta.linear_solve._woodbury import woodbury

SOLVERS: dict[str, Callable[..., LinearSolver]] = {
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
    "cg",
    "direct",
    "explain",
    "extreme_eigenvalues",
    "jacobi",
    "make_solver",
    "minres",
    "neumann",
    "woodbury",
]

"""Matrix-free solvers of A x = b and their preconditioners: one file each."""

from collections.abc import Callable

from memmeta._shared.readable import readable
from memmeta.linear_solve._bicgstab import bicgstab
from memmeta.linear_solve._cg import cg
from memmeta.linear_solve._direct import direct
from memmeta.linear_solve._explain import explain
from memmeta.linear_solve._gmres import gmres
from memmeta.linear_solve._jacobi import jacobi
from memmeta.linear_solve._kronecker import kronecker
from memmeta.linear_solve._lineax import from_lineax, optimistix_adjoint
from memmeta.linear_solve._minres import minres
from memmeta.linear_solve._neumann import neumann
from memmeta.linear_solve._normal_cg import normal_cg
from memmeta.linear_solve._nystrom import nystrom
from memmeta.linear_solve._solution import (
    LinearSolution,
    LinearSolver,
    Preconditioner,
    System,
    make_solver,
)
from memmeta.linear_solve._spectrum import extreme_eigenvalues, largest_eigenvalue_bound
from memmeta.linear_solve._woodbury import woodbury

SOLVERS: dict[str, Callable[..., LinearSolver]] = {
    "bicgstab": bicgstab,
    "cg": cg,
    "direct": direct,
    "gmres": gmres,
    "minres": minres,
    "neumann": neumann,
    "normal_cg": normal_cg,
    "woodbury": woodbury,
}
"""Every solver, by name; the shared conformance test runs over this list."""

PRECONDITIONERS: dict[str, Callable[..., Preconditioner]] = {
    "jacobi": jacobi,
    "kronecker": kronecker,
    "nystrom": nystrom,
}
"""Every preconditioner, by name: each goes with each Krylov solver."""

__all__ = [
    "PRECONDITIONERS",
    "SOLVERS",
    "LinearSolution",
    "LinearSolver",
    "Preconditioner",
    "System",
    "bicgstab",
    "cg",
    "direct",
    "explain",
    "extreme_eigenvalues",
    "from_lineax",
    "gmres",
    "jacobi",
    "kronecker",
    "largest_eigenvalue_bound",
    "make_solver",
    "minres",
    "neumann",
    "normal_cg",
    "nystrom",
    "optimistix_adjoint",
    "woodbury",
]

readable(__name__)

"""What the spectrum of the mixing matrices says about a topology, before a step is run.

Pure functions of a Topology. Symbols as in Chen et al., "Accelerating gossip SGD with periodic
global averaging", ICML 2021, arXiv 2105.09080: W doubly stochastic, J = 11'/n, period H.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
from scipy.sparse import csc_array, csr_array, identity
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, splu

from decentral.topology.core import Topology

DENSE_UP_TO = 1500  # workers; a dense singular value decomposition of this size takes a second
ZERO = 1e-12  # a norm of P - J below this is round-off: P is the exact average


def beta(topology: Topology) -> float:
    """How much of the disagreement between workers is left after one step of mixing.

    Static: ||W - J||_2. Time-varying, P = W(tau-1) ... W(0) the product over one period:
    ||P - J||_2^(1/tau). Chen et al. 2021 for the static case. Above `DENSE_UP_TO`
    workers no dense [n, n] array is formed. 0 is exact averaging, 1 is none; it may exceed 1 where
    W is not doubly stochastic.
    """
    norm = _dense_norm(topology) if topology.n <= DENSE_UP_TO else _sparse_norm(topology)
    # a root would lift round-off into sight: (1e-17)^(1/4) = 6e-5
    return 0.0 if norm < ZERO else norm ** (1 / topology.period)


def c_beta(beta: float, period: int | None) -> float:
    """C_beta = sum_{k<H} beta^k = (1 - beta^H) / (1 - beta), the steps that disagreement lasts.

    period None stands for H = infinity (no global average). Chen et al. 2021.
    """
    if beta == 1:
        return math.inf if period is None else float(period)
    if period is None:
        return 1 / (1 - beta)
    return (1 - beta**period) / (1 - beta)


def d_beta(beta: float, period: int | None) -> float:
    """D_beta = min(H, 1 / (1 - beta)), for 0 <= beta <= 1; period None stands for H = infinity.

    Chen et al. 2021.
    """
    by_mixing = math.inf if beta == 1 else 1 / (1 - beta)
    return by_mixing if period is None else min(float(period), by_mixing)


def describe(topology: Topology, period: int | None = None) -> dict[str, Any]:
    """The figures of a topology in plain Python types, ready for JSON (infinities are None).

    `graphs` is the number of graphs in a time-varying sequence (1: static), `edges` the links used
    at least once in it; `degree` counts the workers that one hears from in a step, over all workers
    and steps. `period` is the H of global averaging that c_beta and d_beta are for, None for never.
    spectral_gap, c_beta and d_beta are None where W is not doubly stochastic: the theory asks it.
    """
    degrees = np.concatenate([np.diff(W.indptr) - 1 for W in topology.matrices])
    norm = beta(topology)
    theory: dict[str, float | None] = dict.fromkeys(("spectral_gap", "c_beta", "d_beta"))
    if topology.is_doubly_stochastic:
        norm = min(norm, 1.0)  # so in exact arithmetic
        theory = {
            "spectral_gap": 1 - norm,
            "c_beta": _finite(c_beta(norm, period)),
            "d_beta": _finite(d_beta(norm, period)),
        }
    links = {
        (u, v) if graph.is_directed() else (min(u, v), max(u, v))
        for graph in topology.graphs
        for u, v in graph.edges()
    }
    return {
        "name": topology.name,
        "n": topology.n,
        "directed": any(graph.is_directed() for graph in topology.graphs),
        "graphs": topology.period,
        "edges": len(links),
        "degree": {
            "min": int(degrees.min()),
            "mean": float(degrees.mean()),
            "max": int(degrees.max()),
        },
        "weights": topology.weights,
        "doubly_stochastic": topology.is_doubly_stochastic,
        "beta": norm,
        "period": period,
        **theory,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _product(matrices: tuple[csr_array, ...]) -> csr_array:
    """P = W(tau-1) ... W(0), sparse: step 0 mixes first."""
    return reduce(lambda P, W: csr_array(W @ P), matrices)


def _dense_norm(topology: Topology) -> float:
    P = reduce(lambda P, W: W @ P, topology.matrices[1:], topology.matrices[0].toarray())
    return float(np.linalg.norm(P - 1 / topology.n, 2))


def _sparse_norm(topology: Topology) -> float:
    """||P - J||_2 as the root of the largest eigenvalue of (P - J)'(P - J).

    Lanczos settles graphs that mix well. It stalls where the eigenvalues crowd near 1 (a ring of
    10,000: 1 - beta = 1.3e-7), but such graphs are cut apart by few links, so that a sparse LU
    factorisation of I - P'P stays small, and its inverse spreads what was crowded.
    """
    n = topology.n
    transposed = [W.T.tocsr() for W in reversed(topology.matrices)]

    def apply(x: np.ndarray) -> np.ndarray:
        x = x.ravel()
        y = reduce(lambda y, W: W @ y, topology.matrices, x) - x.mean()
        return reduce(lambda z, W: W @ z, transposed, y) - y.mean()

    gram = LinearOperator((n, n), matvec=apply, dtype=np.float64)  # pyright: ignore
    start = np.random.default_rng(0).standard_normal(n)  # fixed: the same figure at every call
    if np.linalg.norm(apply(start)) < ZERO * np.linalg.norm(start):
        return 0.0  # P = J, where Lanczos has nothing to work on
    exact = topology.is_doubly_stochastic  # else the norm is no rate, and six digits are plenty
    try:
        return math.sqrt(_largest(gram, start, tolerance=0 if exact else 1e-6))
    except ArpackNoConvergence:
        if not exact:
            raise
        return math.sqrt(1 - 1 / _largest_of_inverse(_product(topology.matrices), start))


def _largest(operator: LinearOperator, start: np.ndarray, tolerance: float = 0) -> float:
    """The largest eigenvalue of a symmetric non-negative operator; tolerance 0: full precision."""
    found = eigsh(
        operator,
        k=1,
        v0=start,
        maxiter=200,
        tol=tolerance,  # pyright: ignore
        return_eigenvectors=False,
    )
    return float(np.asarray(found)[0])


def _largest_of_inverse(P: csr_array, start: np.ndarray) -> float:
    """1 / (1 - beta^2), the largest eigenvalue of the pseudo-inverse of I - P'P.

    P is doubly stochastic, so the null space is the vector of ones: one worker is grounded (row and
    column 0 removed) and the mean taken out before and after the solve.
    """
    n = len(start)
    grounded = splu(csc_array(identity(n) - P.T @ P)[1:, 1:])

    def solve(b: np.ndarray) -> np.ndarray:
        b = b.ravel()
        x = np.concatenate([[0.0], grounded.solve((b - b.mean())[1:])])
        return x - x.mean()

    inverse = LinearOperator((n, n), matvec=solve, dtype=np.float64)  # pyright: ignore
    return _largest(inverse, start)

"""Sharpness and trace of a Hessian that is known by its products with vectors alone."""

import logging
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

log = logging.getLogger(__name__)

RESTARTS = 30  # of Lanczos, each of at most 20 products

Product = Callable[[Tensor], Tensor]  # v [D] -> H v [D]


def top_eigenvalue(product: Product, start: Tensor, tolerance: float) -> float:
    """The largest eigenvalue of H, to `tolerance` of itself: NaN, and a warning, if not found.

    The largest, not that of largest size: a saddle's most negative curvature bounds no step.
    By ARPACK's restarted Lanczos iteration from `start` [D], on the CPU, which keeps 20 vectors.
    """
    if len(start) == 1:
        return (product(start) / start).item()

    def matvec(v: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.array(v).reshape(-1)).to(start)
        return product(given).cpu().numpy()

    own = start.cpu().numpy()
    operator = LinearOperator((len(own), len(own)), matvec=matvec, dtype=own.dtype)  # pyright: ignore[reportCallIssue]
    try:
        values = eigsh(
            operator,
            k=1,
            which="LA",
            v0=own,
            tol=tolerance,  # pyright: ignore[reportArgumentType]
            maxiter=RESTARTS,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence:
        log.warning(
            "no top eigenvalue to %g of itself after %d restarts of Lanczos; raise"
            " diagnostics.sharpness.tolerance",
            tolerance,
            RESTARTS,
        )
        return math.nan
    return float(np.ravel(values)[0])


def hutchinson(product: Product, vectors: Iterable[Tensor]) -> tuple[float, float]:
    """Trace of H, and the standard error of it, from random `vectors` of signs, two at least.

    E v'Hv = tr H for independent signs v_d = +-1, and Var v'Hv = 2 sum_(d != e) H_de^2: of a
    diagonal H every vector gives the trace itself. Hutchinson 1990.
    """
    values = np.array([torch.dot(v.double(), product(v).double()).item() for v in vectors])
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))

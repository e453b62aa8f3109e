"""How much of a stochastic gradient is gradient, and how much is noise.

Zhang et al. 2022 (arXiv 2110.06256) watch these norms: the loss of a network settles while the
gradient's norm does not vanish, so what training settles in is no stationary point.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from decentral.replica import squared_norm


class GradientNorms(NamedTuple):
    """Estimates of ||E g||^2, E ||g||^2 and E ||g - E g||^2."""

    full: float
    stochastic: float
    noise: float


def gradient_norms(gradients: Iterable[Tensor]) -> GradientNorms:
    """Unbiased estimates from m >= 2 independent stochastic gradients g_b, [D] each.

    Write g_b = f + e_b with f = E g, E e_b = 0, E ||e_b||^2 = V, and gbar = (1/m) sum_b g_b.
    As the e_b are independent, E ||(1/m) sum_b e_b||^2 = V/m, so

        E ||gbar||^2             = ||f||^2 + V/m      the estimate of ||f||^2, with a floor of V/m
        E ||g_b||^2              = ||f||^2 + V
        E sum_b ||g_b - gbar||^2 = sum_b E ||g_b||^2 - m E ||gbar||^2 = (m-1) V

    Hence noise = 1/(m-1) sum_b ||g_b - gbar||^2 has the mean V, and full = ||gbar||^2 - noise/m
    the mean ||f||^2, without the floor. With stochastic = 1/m sum_b ||g_b||^2 it holds for every
    draw, not on average alone, that stochastic = full + noise: that is how `full` is computed.
    It may fall below 0 where the gradient is lost in the noise.

    Deviations are taken from the first gradient: among equal ones there is no noise but 0.
    """
    first = total = None
    stochastic = deviation = 0.0
    m = 0
    for gradient in gradients:
        if first is None or total is None:
            first, total = gradient, torch.zeros_like(gradient)
        shifted = gradient - first
        total += shifted
        deviation += squared_norm(shifted).item()
        stochastic += squared_norm(gradient).item()
        m += 1
    assert total is not None, "two gradients at least"
    noise = (deviation - squared_norm(total).item() / m) / (m - 1)
    return GradientNorms(stochastic / m - noise, stochastic / m, noise)

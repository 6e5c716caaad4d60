"""A Gaussian posterior of a linear head by forward-backward variational inference, FB-GVI (arXiv 2304.05398).

With V(w) = -log likelihood(w) + prior |w|^2 / 2, N(m, S) goes from step to step by

    m    <- m - h E grad V                                   forward: a gradient step of E V in Wasserstein's geometry
    S'    = (I - h E hess V) S (I - h E hess V)
    S    <- (S' + 2h I + (S' (S' + 4h I))^(1/2)) / 2          backward: the proximal step of the negative entropy

with expectations over N(m, S). The last line is the N(., S) that minimises W2^2(S', S)/2 - (h/2) log det S: with
eigenvalues s'^2 of S' and s^2 of S it is the root of s - s' - h/s = 0. At rest E grad V = 0 and S^-1 = E hess V.

The method needs h <= 1/beta for a Hessian of at most beta. Any coordinates will do, so it runs in those, u, where
the bound prior I + c F'F of the Hessian (c = 1/noise^2, or the logistic function's 1/4) is I: there beta is 1
whatever the features, and h = 1 reaches a Gaussian likelihood's posterior in one step. The expectations of a linear
head are over one number f'w a row: exact by quadrature, or, the stochastic form, of samples of w.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_NODES = 64  # of the quadrature
_TOLERANCE = 1e-6


def forward_backward(
    mean: Tensor, cov: Tensor, gradient: Tensor, hessian: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """One step of FB-GVI, with expectations of V's gradient and Hessian: the next mean and covariance."""
    pull = torch.eye(len(mean), dtype=mean.dtype) - step * hessian
    values, vectors = torch.linalg.eigh(pull @ cov @ pull.mT)
    values = values.clamp_min(0)
    values = (values + 2 * step + (values * (values + 4 * step)).sqrt()) / 2
    return mean - step * gradient, (vectors * values) @ vectors.mT


def fit(
    features: Tensor,
    targets: Tensor | None,
    prior: float,
    noise: float = 1.0,
    samples: int = 0,
    step: float | None = None,
    steps: int = 1000,
) -> tuple[Tensor, Tensor]:
    """The posterior of w, prior N(0, I / prior): mean ``[d]`` and ``factor [d, d]``, covariance factor factor'.

    Args:
        features: ``[n, d]``; of comparisons, those of the better less those of the worse.
        targets: ``[n]`` scores, f'w plus a Gaussian of standard deviation ``noise``; ``None`` for comparisons,
            each of which has the probability sigmoid(f'w) (Bradley-Terry).
        samples: of w in a step, the stochastic form, which returns the mean over the second half of its steps; 0 for
            exact expectations, which end where no entry moves by more than 1e-6, else with a ValueError.
        step: h, by default 1, in the stochastic form 0.05.
    """
    features = features.double()
    step = step or (0.05 if samples else 1.0)
    eye = torch.eye(features.shape[1], dtype=torch.float64)
    lower = torch.linalg.cholesky(prior * eye + features.mT @ features * (0.25 if targets is None else noise**-2))
    rows = torch.linalg.solve_triangular(lower, features.mT, upper=False).mT  # f'w = row'u with u = lower' w
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    penalty = prior * inverse @ inverse.mT
    nodes, weights = (torch.from_numpy(found) for found in np.polynomial.hermite_e.hermegauss(_NODES))
    weights = weights / weights.sum()
    generator = torch.Generator().manual_seed(0)
    mean, cov = torch.zeros(len(lower), dtype=torch.float64), eye
    total = [torch.zeros_like(mean), torch.zeros_like(cov)]
    for done in range(steps):
        if samples:
            drawn = torch.randn(len(mean), samples, dtype=torch.float64, generator=generator)
            values = rows @ (mean.unsqueeze(-1) + _root(cov) @ drawn)
            weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
        else:
            spread = ((rows @ cov) * rows).sum(dim=-1).clamp_min(0).sqrt()
            values = (rows @ mean).unsqueeze(-1) + spread.unsqueeze(-1) * nodes
        if targets is None:
            share = torch.sigmoid(-values)
            slope, curve = -(share @ weights), (share * (1 - share)) @ weights
        else:
            slope = (values @ weights - targets.double()) / noise**2
            curve = torch.full_like(slope, noise**-2)
        gradient = rows.mT @ slope + penalty @ mean
        hessian = (rows.mT * curve) @ rows + penalty
        before = mean, cov
        mean, cov = forward_backward(mean, cov, gradient, hessian, step)
        if samples and done >= steps // 2:
            total = [total[0] + mean, total[1] + cov]
        moved = max((new - old).abs().max().item() for new, old in zip((mean, cov), before, strict=True))
        if not samples and moved < _TOLERANCE:
            break
    else:
        if not samples:
            raise ValueError(f"the posterior has not come to rest after {steps} steps: raise the prior ({prior:g})")
        mean, cov = (part / (steps - steps // 2) for part in total)
    return inverse.mT @ mean, inverse.mT @ _root(cov)


def _root(cov: Tensor) -> Tensor:
    """Some factor with factor factor' = cov."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp_min(0).sqrt()

"""Where J-BOND with a pull to the initial policy comes to rest, and what of the possible win rate it has there.

    python recipes/miniature/stationary.py

At rest the anchor is the policy, and its advantage is the same for all responses. With F the quantile of a response
among the policy's own,

    gamma_ref log(pi / pi_ref) = c + (1 - beta) g(F) + beta (N - 1) h(F),        g(F) = N F^(N - 1)

where h is the mean of the harmonic log quantile over S samples: about log F, but not below -H_(S - 1). So pi/pi_ref
is known as a function of F, and with it the quantile u(F) among the reference's responses, without ties. The limit is
the highest win rate at that KL: the reference tilted by exp(lambda u) (:mod:`bond_plugin.bestofn.limits`).
"""

from __future__ import annotations

import functools
from math import comb

import torch
from torch import Tensor

from bond_plugin.bestofn.limits import Front, win_rate_front

POINTS = 100_000
GAMMAS = (1.0, 0.6, 0.45, 0.3, 0.2)


def log_quantile(quantile: Tensor, samples: int) -> Tensor:
    """E[H_K] - H_(S - 1), K of the S - 1 other samples being below: what the harmonic log quantile is on average."""
    harmonic = torch.cat([torch.zeros(1), (1 / torch.arange(1, samples)).cumsum(0)]).double()
    mean = torch.zeros_like(quantile)
    for below in range(samples):
        chance = comb(samples - 1, below) * quantile**below * (1 - quantile) ** (samples - 1 - below)
        mean += chance * (harmonic[below] - harmonic[-1])
    return mean


def at_rest(gamma_ref: float, beta: float = 0.5, n: int = 2, samples: int = 8) -> tuple[float, float]:
    """(KL to the initial policy in nats, win rate against it) of the policy at rest."""
    own = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS  # quantiles among the policy's own responses
    pull = (1 - beta) * n * own ** (n - 1) + beta * (n - 1) * log_quantile(own, samples)
    log_ratio = pull / gamma_ref
    reference = torch.exp(-log_ratio)  # of pi_ref, up to a constant, on pieces of equal probability under pi
    log_ratio = log_ratio + reference.mean().log()
    quantiles = reference.cumsum(0) / reference.sum()
    return log_ratio.mean().item(), quantiles.mean().item()


@functools.cache
def front() -> Front:
    """The highest win rate that any policy can have at a KL: of rewards without ties it is one and the same."""
    return win_rate_front(torch.arange(4096.0).unsqueeze(0))


def main() -> None:
    print("gamma_ref   KL, nats   win rate   of the limit    with beta 1: KL   win rate   of the limit")
    for gamma_ref in GAMMAS:
        row = f"{gamma_ref:9.2f}"
        for beta in (0.5, 1.0):
            kl, win_rate = at_rest(gamma_ref, beta)
            share = (win_rate - 0.5) / (front().at(kl).item() - 0.5)
            row += f"{kl:11.2f}{win_rate:11.3f}{share:15.1%}" + ("        " if beta < 1 else "")
        print(row)


if __name__ == "__main__":
    main()

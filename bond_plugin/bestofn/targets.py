"""Targets that depend on the reward's quantile alone: Best-of-N, Best-of-Poisson and the exponential tilt.

Each multiplies the source (an anchor, or the reference) by g(F), F being the reward's quantile under it, and is the
best of a *random number* n of samples of the source. So with G the integral of g from 0

    G(F) = E[F^n] = sum_j P(n = j) F^j,    G(0) = 0,    G(1) = 1

    best_of_n        n = N                 G = F^N                              log g = log N + (N-1) log F
    best_of_poisson  n = 1 + Poisson(mu)   G = F exp(-mu (1-F))                 log g = log(1 + mu F) - mu (1-F)
    exponential      n = Poisson(1/T) > 0  G = (exp(F/T) - 1) / (exp(1/T) - 1)  log g = F/T - log Z

with log Z = log(T (exp(1/T) - 1)). Best-of-Poisson is arXiv 2506.19248's. The exponential tilt is the optimum of
reinforcement learning with the reward F and the KL coefficient T; no policy has a higher win rate at its KL.

Where rewards tie, a level of mass p_<= - p_< is multiplied by (G(p_<=) - G(p_<)) / (p_<= - p_<): that is what becomes
of it when ties are broken uniformly at random (for Best-of-N Theorem 1 of arXiv 2407.14622).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.bestofn.distribution import log_bon_ratio
from bond_plugin.bestofn.pooled import harmonic_log_quantile, pooled_quantiles, pooled_tilt

TARGETS: tuple[str, ...] = ("best_of_n", "best_of_poisson", "exponential")
#: How much of the law of n may lie above the number of samples that there are.
TAIL = 0.01
_MOST = 10_000  # samples on average


class Target:
    """One of the above.

    Attributes:
        scale: log g / scale is the reward whose optimum under the KL coefficient 1 / scale is the target.
        vanishes: g(0) = 0, so that an estimated quantile must not be 0.
        samples: of the source, enough to draw from the target: the law of n has at most :data:`TAIL` above.
    """

    scale: float
    vanishes: bool
    samples: int

    def log_tilt(self, p_lt: Tensor, p_le: Tensor) -> Tensor:
        """log of (G(p_<=) - G(p_<)) / (p_<= - p_<), in nats, float64; where the two are equal, log g. Any shape."""
        raise NotImplementedError

    def _of_ties(self, p_lt: Tensor, p_le: Tensor) -> Tensor:
        """The log of a level's mean of g less log g of the level's middle, 0 where nothing ties; the same shape."""
        middle = (p_lt + p_le) / 2
        return torch.where(p_le > p_lt, self.log_tilt(p_lt, p_le) - self.log_tilt(middle, middle), 0.0)

    def pooled(self, rewards: Tensor, weights: Tensor, normalised: bool = False) -> tuple[Tensor, Tensor]:
        """The factor of each sample and log g - log g(1), ``[P, S]`` float64 each, from the others of its prompt.

        Arguments as for :func:`~bond_plugin.bestofn.pooled.pooled_tilt`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class BestOfN(Target):
    """The best of N samples, N >= 2."""

    n: int
    vanishes = True

    def __str__(self) -> str:
        return f"Best-of-{self.n}"

    @property
    def scale(self) -> int:
        return self.n - 1

    @property
    def samples(self) -> int:
        return self.n

    def log_tilt(self, p_lt: Tensor, p_le: Tensor) -> Tensor:
        return log_bon_ratio(p_lt, p_le, self.n)

    def pooled(self, rewards: Tensor, weights: Tensor, normalised: bool = False) -> tuple[Tensor, Tensor]:
        """By :func:`pooled_tilt` and :func:`harmonic_log_quantile`, with equals as one half in the latter.

        That is right for N = 2, whose g is linear. Of other N the mean of g over a level of equal rewards is not g
        of its middle; the difference of their logarithms is added. By enumeration as below the bias is then at most
        0.020, 0.007, 0.003 nats for N = 4 (without it 0.69 at any S), and 0.077, 0.036, 0.017 for N = 8.
        """
        tilt = pooled_tilt(rewards, weights, self.n, normalised)
        log_tilt = (self.n - 1) * harmonic_log_quantile(rewards, weights, normalised)
        if self.n > 2:
            log_tilt = log_tilt + self._of_ties(*pooled_quantiles(rewards, weights, normalised))
        return tilt, log_tilt


@dataclass(frozen=True)
class _Poisson(Target):
    """n is a Poisson variable or one more: log g - log g(1) = log(1 - ratio (1 - F)) - rate (1 - F)."""

    rate: float
    vanishes = False

    @property
    def scale(self) -> float:
        return self.rate

    @property
    def samples(self) -> int:
        most = torch.arange(1, math.ceil(self.rate + 10 * math.sqrt(self.rate)) + 11, dtype=torch.float64)
        return 1 + int((1 - self._log_law(most).exp().cumsum(dim=-1) > TAIL).sum())

    def law(self, most: int) -> Tensor:
        """``[most]`` float64: the probabilities of n = 1, 2, ... ``most``, the last with all that lie above."""
        found = self._log_law(torch.arange(1, most, dtype=torch.float64)).exp()
        return torch.cat([found, (1 - found.sum()).clamp(min=0).reshape(1)])

    def pooled(self, rewards: Tensor, weights: Tensor, normalised: bool = False) -> tuple[Tensor, Tensor]:
        """Both by sums over subsets of the others, as for Best-of-N.

        The factor is without bias that of the best of min(n, S) samples: S is all there are.

        log(1 - ratio (1 - F)) is estimated by its Taylor series cut at S - 1, and rate (1 - F) by what lies above,
        without bias, at F half-way between p_< and p_<=. What is added where others tie has a bias as 1 / S: by
        enumeration for 0/1 rewards, a quarter of them right, and samples of the source itself, at S = 8, 16, 32 at
        most 0.080, 0.038, 0.019 nats for T = 0.1 (without it 1.7), and 0.058, 0.028, 0.014 for a mean of 8.
        """
        tilt = pooled_tilt(rewards, weights, self.law(rewards.shape[-1]), normalised)
        above = pooled_tilt(-rewards, weights, 2, normalised) / 2
        series = harmonic_log_quantile(rewards, weights, normalised, self.ratio) if self.ratio else 0.0
        return tilt, series - self.rate * above + self._of_ties(*pooled_quantiles(rewards, weights, normalised))


class BestOfPoisson(_Poisson):
    """The best of 1 + Poisson(rate) samples, rate > 0."""

    def __str__(self) -> str:
        return f"Best-of-Poisson {1 + self.rate:g}"

    @property
    def ratio(self) -> float:
        return self.rate / (1 + self.rate)

    def log_tilt(self, p_lt: Tensor, p_le: Tensor) -> Tensor:
        low, high = p_lt.double(), p_le.double()
        apart = high > low
        gap = torch.where(apart, (high - low) / torch.where(apart, high, 1.0), 0.0)
        power = torch.log1p(-gap) - self.rate * (high - low)  # log of G(p_<) / G(p_<=)
        share = torch.where(apart, -torch.expm1(power) / torch.where(apart, gap, 1.0), 1 + self.rate * high)
        return torch.log(share) - self.rate * (1 - high)

    def _log_law(self, j: Tensor) -> Tensor:
        return (j - 1) * math.log(self.rate) - self.rate - torch.lgamma(j)


class Exponential(_Poisson):
    """The tilt by exp(rate F), rate > 0."""

    ratio = 0.0

    def __str__(self) -> str:
        return f"exp(F / {1 / self.rate:g})"

    def log_tilt(self, p_lt: Tensor, p_le: Tensor) -> Tensor:
        low, high = p_lt.double(), p_le.double()
        gap = high - low
        apart = gap > 0
        share = torch.where(apart, -torch.expm1(-self.rate * gap) / torch.where(apart, gap, 1.0), self.rate)
        return torch.log(share) - self.rate * (1 - high) - math.log(-math.expm1(-self.rate))

    def _log_law(self, j: Tensor) -> Tensor:
        return j * math.log(self.rate) - self.rate - torch.lgamma(j + 1) - math.log(-math.expm1(-self.rate))


def target_of(name: str, n: float, temperature: float, prefix: str = "bond") -> Target:
    """The target that the flags of a method say: n is whole, >= 2; of Best-of-Poisson 1 + mu, any number above 1.

    Raises:
        ValueError: a number out of its range; the message names the flag, which begins with ``prefix``.
    """
    if name == "exponential":
        if not 1 / _MOST <= temperature < math.inf:
            raise ValueError(f"--{prefix}.temperature must be at least {1 / _MOST:g}, got {temperature}")
        return Exponential(1 / temperature)
    if name == "best_of_poisson":
        if not 1 < n <= _MOST:
            raise ValueError(
                f"--{prefix}.n must be above 1 (one sample is the source itself) and at most {_MOST} for "
                f"--{prefix}.target best_of_poisson, got {n}"
            )
        return BestOfPoisson(n - 1)
    if n < 2:
        raise ValueError(f"--{prefix}.n must be at least 2 (Best-of-1 is the source itself), got {n}")
    if not float(n).is_integer():
        raise ValueError(
            f"--{prefix}.n must be a whole number, got {n}: --{prefix}.target best_of_poisson takes any mean number"
        )
    return BestOfN(int(n))

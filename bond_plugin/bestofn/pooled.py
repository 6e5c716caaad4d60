"""Best-of-N of a source distribution estimated from all samples of a prompt, each compared with all others.

A prompt has S samples: n of the behaviour policy mu, m = S - n of the source, whose Best-of-N is the target (an
anchor, or the reference). m = 0 needs no sample of the source at all, only its log-probabilities. All samples
count as drawn from the mixture q = (n mu + m source) / S and are weighted by a = source / q (balance heuristic,
Veach and Guibas 1995). The estimators are ours. Everything about a sample is told by *which subsets of the others
it beats*, so that each is a ratio of elementary symmetric polynomials e_j of weights, the coefficients of
prod_i (1 + a_i x). They are built for all samples at once by a scan over the sorted rewards, as logarithms: all
terms are positive, nothing cancels, and no range of weights overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

_CHUNK = 2**18  # numbers that are held at once: few enough for a cache of the processor


def mixture_weights(policy_ratio: Tensor, source_ratio: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What each sample counts for an expectation under the source, and under the policy (balance heuristic).

        a = source / q,    p = pi / q,    q = (n mu + m source) / S

    At m > 0, a <= S / m, whatever the policy. The mean of ``a * f(y)`` over the S samples is unbiased for the
    mean of f under the source, that of ``p * f(y)`` for the mean under the policy.

    What compares samples with each other is exact for m = 0 only: for m > 0 the *others* of a sample are not the
    mixture q. By enumeration at n = m, :func:`pooled_tilt` and its gradient have a bias as 1 / (S - 1) for N = 2, the
    log-quantile of up to 0.070, 0.053, 0.033 nats at S = 4, 8, 16; none where source = mu.

    Args:
        policy_ratio, source_ratio: ``[P, S]``, log pi(y) - log mu(y) and log source(y) - log mu(y); of the latter
            ``-inf`` where the source has no mass.
        n: how many of the S samples were drawn from mu, 1 <= n <= S; the rest from the source.

    Returns:
        (a, p), ``[P, S]`` float64, >= 0.

    Raises:
        ValueError: a ratio that is NaN, or a weight beyond float64.
    """
    size = policy_ratio.shape[-1]
    policy, source = policy_ratio.double(), source_ratio.double()
    mixture = torch.zeros_like(source)  # log q - log mu
    if n < size:
        mixture = torch.logaddexp(mixture + math.log(n / size), source + math.log((size - n) / size))
    a, p = (source - mixture).exp(), (policy - mixture).exp()
    if not (torch.isfinite(a) & torch.isfinite(p)).all():
        raise ValueError("a sample's weight is not a number, or beyond float64: the distributions are too far apart")
    return a, p


def pooled_tilt(rewards: Tensor, weights: Tensor, n: int | Tensor, normalised: bool = False) -> Tensor:
    """Best-of-N over source at every sample, pi_BoN(y) / source(y), from the prompt's other samples.

        N  sum over subsets J of N - 1 others, none better than i, of prod_{j in J} a_j / (1 + ties of i in J)

    divided by C(S - 1, N - 1). With the samples independent and of one distribution (m = 0) it is unbiased for
    g_N(y_i) = (p_<=^N - p_<^N) / (p_<= - p_<), Theorem 1 of arXiv 2407.14622 with ties broken at random, given y_i.

    Args:
        rewards, weights: ``[P, S]``, the former finite, the latter a of :func:`mixture_weights`.
        n: N of Best-of-N, 1 <= N <= S. Of the best of a random number of samples the probabilities of N = 1, 2, ...
            k, ``[k]``, k <= S: the above of each N times its probability. Those of N = 1 multiply the source by 1.
        normalised: divide by the sum of the products over *all* subsets of N - 1 others. The result is then in
            [0, N] and does not depend on the weights' scale, but has a bias as 1 / S: by enumeration for weights of
            2, 2/3 and 4/5, at S = 4, 8, 16 at most 0.053, 0.025, 0.012 for N = 2.

    Returns:
        ``[P, S]`` float64, >= 0. 0 where fewer than N - 1 others have a positive weight.
    """
    law = [0.0] * (n - 1) + [1.0] if isinstance(n, int) else n.tolist()
    series = [j * share for j, share in enumerate(law, start=1)]
    return _in_blocks(_subset_series, rewards, weights, rewards.shape[-1] * len(series), series, normalised, False)


def pooled_quantiles(rewards: Tensor, weights: Tensor, normalised: bool = False) -> tuple[Tensor, Tensor]:
    """p_< and p_<= of every sample under the source, from the prompt's other samples.

    As :func:`pooled_tilt`; ``normalised`` divides by the weights of all others instead of by their number. Otherwise
    they are without bias, and may be above 1. (p_lt, p_le), ``[P, S]`` float64.
    """
    ordered, index = rewards.sort(dim=-1)
    of = weights.gather(-1, index)
    sums = nn.functional.pad(of.cumsum(dim=-1), (1, 0))
    first, end = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
    below, place = sums.gather(-1, first), index.argsort(dim=-1)
    equal = torch.where(end - first > 1, sums.gather(-1, end) - below - of, 0.0).clamp(min=0)
    whole = sums[..., -1:] - of if normalised else torch.full_like(of, rewards.shape[-1] - 1)
    shares = (torch.where(whole > 0, part / whole, 0.0) for part in (below, below + equal))
    low, high = (share.gather(-1, place) for share in shares)
    return low, high


def harmonic_log_quantile(rewards: Tensor, weights: Tensor, normalised: bool = False, ratio: float = 1.0) -> Tensor:
    """The log of each sample's quantile F under the source, from its rank among the prompt's k = S - 1 other samples.

        -sum_{j=1..k} (1 / j) e_j(weights of those above i) / C(k, j)

    Its expectation given y_i is -sum_{j=1..k} (1 - F)^j / j, the Taylor series of log F cut at k: always finite. With
    all weights one it is H_c - H_k, for c samples below and H_j = 1 + 1/2 + ... + 1/j. An equal counts as half a
    sample above, so that F is (p_< + p_<=) / 2 and log F is log g_2 / 2 itself.

    Ranks within a prompt are not independent: with all weights one and no equals, subtracting the leave-one-out mean
    multiplies the result by S / (S - 1), up to a constant. Subtract a constant instead: the mean is -k / (k + 1).

    Args:
        rewards, weights: ``[P, S]``, as for :func:`pooled_tilt`, S >= 2.
        normalised: divide by e_j of all others instead of C(k, j). The result is then in [-H_k, 0] and does not
            depend on the weights' scale, but has a bias as 1 / S: by enumeration for weights of 2, 2/3 and 4/5, at
            S = 8, 16, 32, 0.019, 0.009, 0.005 nats for the best generation; 0.131, 0.151, 0.122 for the lowest.
        ratio: in (0, 1]. Term j is multiplied by its j-th power, which makes it the series of log(1 - ratio (1 - F)).

    Returns:
        ``[P, S]`` float64, in nats, <= 0. In time O(S^2) a prompt, normalised O(S^3).
    """
    if not normalised:
        return _in_blocks(_harmonic_integral, rewards, ratio * weights, rewards.shape[-1] ** 2 // 2)
    series = [0.0] + [-(ratio**j) / j for j in range(1, rewards.shape[-1])]
    return _in_blocks(_subset_series, -rewards, weights, rewards.shape[-1] ** 2, series, normalised, True)


def _harmonic_integral(rewards: Tensor, weights: Tensor) -> Tensor:
    """-sum_j (1 / j) e_j(b) / C(k, j), of the b = a above and a / 2 of equals, without any e_j.

    With 1 / C(k, j) = (k + 1) int_0^1 t^j (1 - t)^(k - j) dt, and x^j / j = int_0^x u^(j - 1) du, it is

        -int_0^1 [prod_b (1 - s + b s) (1 - s)^(k - number of b) - (1 - s)^k] / s ds

    a polynomial of degree k - 1 in s, which Gauss's rule with k / 2 nodes integrates exactly. ``[P, S]``.
    """
    others = rewards.shape[-1] - 1
    nodes, shares = numpy.polynomial.legendre.leggauss((others + 1) // 2)
    s, share = (torch.as_tensor(x, device=rewards.device).view(-1, 1, 1) for x in ((1 + nodes) / 2, shares / 2))
    ordered, index = rewards.neg().sort(dim=-1)
    of = weights.gather(-1, index)
    first, end = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))

    def before(logs: Tensor, place: Tensor) -> Tensor:
        """``[nodes, P, S]``: the sum of those that come before ``place``, ``[P, S]`` from 0 to S."""
        sums = nn.functional.pad(logs.cumsum(dim=-1), (1, 0))
        return sums.gather(-1, place.expand(len(s), *place.shape))

    none = torch.log1p(-s)
    halves = torch.log1p(s * (of / 2 - 1)) - none
    above = before(torch.log1p(s * (of - 1)) - none, first)
    ties = before(halves, end) - before(halves, first) - halves
    # What is subtracted is the smaller one, and close only where both are: nothing cancels, nothing overflows.
    found = (share / s * (others * none + above + ties).exp() * torch.expm1(-above - ties)).sum(dim=0)
    return found.gather(-1, index.argsort(dim=-1))


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum a)^2 / sum a^2 / S: the share of a prompt's samples that its weights leave (Kish 1965).

    ``[P, S]`` float64 weights, a of :func:`mixture_weights`, to ``[P]`` in [1 / S, 1]; 0 where all are zero.
    """
    largest = weights.amax(dim=-1, keepdim=True)
    scaled = weights / torch.where(largest > 0, largest, 1.0)
    # The largest is 1 now, so that the clamp changes nothing but 0 / 0.
    return scaled.sum(dim=-1).square() / scaled.square().sum(dim=-1).clamp(min=1) / weights.shape[-1]


def _in_blocks(estimate: Callable[..., Tensor], rewards: Tensor, weights: Tensor, held: int, *more: Any) -> Tensor:
    """``estimate`` of some prompts at a time, of each of which it holds so many numbers."""
    rows = max(1, _CHUNK // max(held, 1))
    blocks = zip(rewards.double().split(rows), weights.double().split(rows), strict=True)
    return torch.cat([estimate(*block, *more) for block in blocks])


def _subset_series(
    rewards: Tensor, weights: Tensor, coefficients: list[float], normalised: bool, halves: bool
) -> Tensor:
    """sum_j coefficients[j] times the weighted share of the subsets of j others of which none is better than i.

    A subset with t ties of i counts 1 / (1 + t), the probability that i comes first among them; with ``halves``
    2^-t. ``[P, S]``.
    """
    degree, others = len(coefficients) - 1, rewards.shape[-1] - 1
    ordered, index = rewards.sort(dim=-1)
    logs = weights.gather(-1, index).log()
    level = torch.searchsorted(ordered, ordered)  # the position of the level's first sample
    everyone = torch.zeros_like(level)
    before, after = _before(logs, everyone, degree), _after(logs, everyone, degree)
    ties = _multiply(_before(logs, level, degree), _after(logs, level, degree), degree)
    t = torch.arange(len(ties), dtype=torch.float64, device=ties.device)
    counted = t * math.log(2) if halves else t.log1p()
    below = before.gather(-1, level.expand(before.shape))
    beaten = _multiply(below, ties - counted.view(-1, 1, 1), degree)
    if normalised:
        total = _multiply(before, after, degree)
    else:
        total = ties.new_tensor([math.log(math.comb(others, j)) for j in range(degree + 1)]).view(-1, 1, 1)
    shares = torch.where(total > -math.inf, (beaten - total).exp(), 0.0)
    series = (shares * shares.new_tensor(coefficients).view(-1, 1, 1)).sum(dim=0)
    return series.gather(-1, index.argsort(dim=-1))


def _before(logs: Tensor, segment: Tensor, degree: int) -> Tensor:
    """log e_j, j <= degree, of the weights of all samples before each one in its segment.

    A scan by doubling (Hillis and Steele 1986): after each step an entry holds the product of the last 1, 2, 4, ...
    factors 1 + a x up to its own, as far as they belong to its segment. ``[P, S]`` logs, and contiguous segments, to
    ``[degree + 1, P, S]``, or fewer coefficients where no segment is long enough to have them.
    """
    products, shift = torch.stack([torch.zeros_like(logs), logs]), 1
    while (same := segment[:, shift:] == segment[:, :-shift]).any():
        joined = _multiply(products[..., :-shift], products[..., shift:], degree)
        products = torch.cat([products, products.new_full((len(joined) - len(products), *logs.shape), -math.inf)])
        joined = torch.where(same, joined, products[..., shift:])
        products = torch.cat([products[..., :shift], joined], dim=-1)
        shift *= 2
    one = torch.full_like(products[..., :1], -math.inf)  # the polynomial of no sample
    one[0] = 0.0
    same = segment[:, 1:] == segment[:, :-1]
    return torch.cat([one, torch.where(same, products[..., :-1], one)], dim=-1)


def _after(logs: Tensor, segment: Tensor, degree: int) -> Tensor:
    return _before(logs.flip(-1), segment.flip(-1), degree).flip(-1)


def _multiply(a: Tensor, b: Tensor, degree: int) -> Tensor:
    """The product of polynomials with positive coefficients, given and returned as logs ``[degree + 1, ...]``."""
    if len(a) > len(b):
        a, b = b, a
    width = min(len(a) + len(b) - 1, degree + 1)
    product = torch.full((width, *a.shape[1:]), -math.inf, dtype=a.dtype, device=a.device)
    for power, coefficient in enumerate(a[:width]):
        place = product[power : power + len(b)]
        torch.logaddexp(place, coefficient + b[: len(place)], out=place)
    return product

"""Rewards that turn Best-of-N distillation into policy gradients, and which of equal samples is the best."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bond_plugin.bestofn.distribution import log_bon_ratio


def random_argmax(rewards: Tensor, generator: torch.Generator) -> Tensor:
    """Where the highest reward is; of equals, uniformly at random.

    Theorem 1 of BOND (arXiv 2407.14622) assumes that the reward orders generations strictly. Its proof
    needs *some* strict order among equals; a random one (rather than the position in the batch) favours no
    sample.

    Args:
        rewards: ``[..., k]``, the rewards of the samples that are compared with each other. Finite.
        generator: source of the random order among equals, on the CPU.

    Returns:
        ``[..., 1]`` int64, in 0 … k-1.

    Raises:
        ValueError: a reward is NaN or infinite: such values have no place in an order.
    """
    if not torch.isfinite(rewards).all():
        raise ValueError("random_argmax needs finite rewards")
    tie_break = torch.rand(rewards.shape, generator=generator, dtype=torch.float64, device="cpu")
    shuffled = tie_break.argsort(dim=-1)
    by_reward = rewards.detach().cpu().gather(-1, shuffled).argsort(dim=-1, stable=True)
    return shuffled.gather(-1, by_reward[..., -1:]).to(rewards.device)


def bond_reward(p_lt: Tensor, p_le: Tensor, n: int, correction: bool = True) -> Tensor:
    """The reward whose KL-regularised optimum is Best-of-N, Eq. 8 of arXiv 2407.14622.

        log p_<= + 1 / (n - 1) log sum_{i=1..n} (p_< / p_<=)^(i-1)

    Maximising its mean minus KL(pi || pi_ref) / (n - 1) minimises KL(pi || pi_BoN): n - 1 times this reward is
    log pi_BoN - log pi_ref.

    Args:
        p_lt, p_le: any shape, as from :func:`~bond_plugin.bestofn.distribution.quantiles`.
        n: >= 2.
        correction: with the second summand, term (B) of Theorem 1. ``False`` is the paper's practical form,
            log p_<= alone: off by a constant where no generation has a mass of its own (p_< = p_<=), and by
            something that is different for each level of the reward where rewards are tied.

    Returns:
        The same shape and dtype, in nats; computed in float64. ``-inf`` where p_le = 0.

    Raises:
        ValueError: n < 2 (Best-of-1 is the reference), or probabilities out of order.
    """
    if n < 2:
        raise ValueError(f"bond_reward needs n >= 2, got {n}")
    log_ratio = log_bon_ratio(p_lt.double(), p_le.double(), n)
    return (log_ratio / (n - 1) if correction else torch.log(p_le.double())).to(p_le.dtype)


def vbon_reward(log_cdf: Tensor, log_ref: Tensor, n: int) -> Tensor:
    """The exact reward of vBoN, arXiv 2407.06057, scaled for a KL coefficient of 1 / (n - 1).

        ( log sum_{i=1..n} C(n, i) F^(n-i) pi_ref^i  -  log pi_ref ) / (n - 1)

    with F = P(r(y') < r(y)) under the reference. By the binomial theorem the sum is (F + pi_ref)^n - F^n.
    With the coefficient 1 / (n - 1) the optimum is pi_BoN itself, because
    KL(pi || pi_BoN) = KL(pi || pi_ref) - E[log pi_BoN - log pi_ref]. The authors' code divides the same sum by
    n, whose optimum is another distribution.

    It takes pi_ref(y) for the mass of y's whole level of reward: generations that tie with y are
    left out. Where many tie, :func:`bond_reward` with the correction is the right reward for both methods.

    Args:
        log_cdf: any shape, log F.
        log_ref: the same shape, log pi_ref(y) of the whole response.
        n: >= 2.

    Returns:
        The same shape and dtype, in nats; computed in float64. Finite at F = 0 and accurate when pi_ref(y)
        underflows; for F > 0 it is that also in the limit of no mass at all.

    Raises:
        ValueError: n < 2, or a positive log-probability.
    """
    if n < 2:
        raise ValueError(f"vbon_reward needs n >= 2, got {n}")
    if not ((log_cdf <= 1e-6) & (log_ref <= 1e-6)).all():
        raise ValueError("vbon_reward needs logs of probabilities, at most 0")
    f, ref = log_cdf.double(), log_ref.double()
    apart = ref - f  # log (pi_ref / F); +inf at F = 0
    # With s = log (1 + pi_ref / F), (F / (F + pi_ref))^n = exp(-n s).
    exponent = math.log(n) + torch.log(torch.nn.functional.softplus(apart))  # log (n s)
    # log ((1 - exp(-n s)) / pi_ref): where n s is tiny, to first order log (n s / pi_ref) = log (n / F)
    log_share = torch.where(exponent < -30, math.log(n) - f, torch.log(-torch.expm1(-exponent.exp())) - ref)
    return ((n * torch.logaddexp(f, ref) + log_share) / (n - 1)).to(log_cdf.dtype)


def jbond_reward(rewards: Tensor, anchor_rewards: Tensor, ties: str = "expected") -> Tensor:
    """The crude log-quantile of J-BOND, Eq. 17 of arXiv 2407.14622.

    With two anchor samples, ``-log 16`` where the policy's sample is worse than both, else 0. It is the
    cheapest reward whose expectation follows log p_<=: E[r] = -log 16 (1 - p)^2 equals log p at p = 1/2
    (appendix A.4). For m anchor samples the same argument gives ``-2^m log 2``, which is ``-log 16`` at the
    paper's m = 2; other m are our extension.

    Args:
        rewards: ``[..., n]`` of the policy's samples.
        anchor_rewards: ``[..., m]`` of the anchor's samples for the same prompt.
        ties: ``expected``: equals are ordered at random, and this is the expectation over their orders: a
            sample that is below no anchor sample but the t it ties with is last with probability 1 / (t + 1).
            ``textbook``: Eq. 17 to the letter, where a tie never fires, so that with 0/1 rewards most prompts
            give no signal at all.

    Returns:
        ``[..., n]`` in the dtype of ``rewards`` (float32 for integers), in nats.

    Raises:
        ValueError: fewer than two anchor samples (Best-of-1 is the anchor itself), or unknown ``ties``.
    """
    m = anchor_rewards.shape[-1]
    if m < 2:
        raise ValueError(f"jbond_reward needs at least 2 anchor samples a prompt, got {m}")
    if ties not in ("expected", "textbook"):
        raise ValueError(f"ties must be 'expected' or 'textbook', got {ties!r}")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    lowest = anchor_rewards.amin(dim=-1, keepdim=True)
    last = (rewards < lowest).to(dtype)
    if ties == "expected":
        equal = (rewards.unsqueeze(-1) == anchor_rewards.unsqueeze(-2)).sum(dim=-1)
        last = torch.where(rewards == lowest, 1 / (equal + 1).to(dtype), last)
    return last * -(2.0**m * math.log(2.0))

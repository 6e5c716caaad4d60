"""A policy and a reward small enough to enumerate, where Best-of-N, every divergence and every gradient are sums.

A response has at most three tokens out of four, one of which ends it: 40 responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.bestofn.distribution import level_probabilities, log_bon_ratio
from bond_plugin.bestofn.targets import Target

#: What a policy is measured against: Best-of-N of the reference, or another target.
Goal = float | Target

VOCABULARY, LENGTH, EOS = 4, 3, 0

#: Which of the problems of this kind (see :meth:`Problem.make`): one in which each single direction of the divergence
#: raises the other above where it started, in the restricted class and for N = 4. That is not so in most of them.
_PROBLEM_SEED = 36


def _responses() -> list[tuple[int, ...]]:
    """All responses: those that end with EOS, shortest first, then those that are cut off at ``LENGTH``."""
    ended, going = [], [()]
    for _ in range(LENGTH):
        longer = [(*prefix, token) for prefix in going for token in range(VOCABULARY)]
        ended += [r for r in longer if r[-1] == EOS]
        going = [r for r in longer if r[-1] != EOS]
    return ended + going


RESPONSES = _responses()
#: ``[S, A]``: 1 on the tokens of each response.
MASK = torch.tensor([[float(i < len(r)) for i in range(LENGTH)] for r in RESPONSES], dtype=torch.float64)
_PREFIXES = sorted({r[:i] for r in RESPONSES for i in range(len(r) + 1)})
#: ``[prefixes, S]``: 1 where the response begins with the prefix.
_BEGINS = torch.tensor([[float(r[: len(p)] == p) for r in RESPONSES] for p in _PREFIXES], dtype=torch.float64)
#: ``[S, A + 1]``: the prefixes of each response, whole responses repeated.
_CHAIN = torch.tensor([[_PREFIXES.index(r[:i]) for i in range(LENGTH + 1)] for r in RESPONSES])
#: ``[S, A, V]``: the prefix that each token of the vocabulary makes in the place of each of a response's.
_NEXT = torch.tensor([
    [[_PREFIXES.index((*r[:i], token)) if i < len(r) else 0 for token in range(VOCABULARY)] for i in range(LENGTH)]
    for r in RESPONSES
])  # fmt: skip


class EnumerablePolicy:
    """log pi(y) = log_softmax(log pi_ref(y) + features(y) . parameters): a few numbers, or one a response.

    Attributes:
        log_ref: ``[S]`` float64, the reference, where all parameters are 0.
        features: ``[S, d]``. The identity makes every distribution possible; fewer columns restrict it.
        parameters: ``[d]`` float64, with gradient.
    """

    def __init__(self, log_ref: Tensor, features: Tensor) -> None:
        self.log_ref = log_ref
        self.features = features
        self.parameters = torch.zeros(features.shape[-1], dtype=torch.float64, requires_grad=True)

    def log_probs(self, parameters: Tensor | None = None) -> Tensor:
        """``[S]``, log pi of whole responses, at ``parameters`` (``[d]``; the policy's own by default)."""
        at = self.parameters if parameters is None else parameters
        return (self.log_ref + self.features @ at).log_softmax(dim=-1)

    def token_log_probs(self) -> Tensor:
        """``[S, A]``, log pi(token | tokens before it), 0 outside the mask; rows add up to :meth:`log_probs`."""
        return token_log_probs(self.log_probs())


def token_log_probs(log_probs: Tensor) -> Tensor:
    """``[S, A]`` of a distribution over :data:`RESPONSES`, ``[S]``: see :meth:`EnumerablePolicy.token_log_probs`."""
    chain = _log_mass(log_probs)[_CHAIN]
    return chain[:, 1:] - chain[:, :-1]


def next_token_log_probs(log_probs: Tensor) -> Tensor:
    """``[S, A, V]``: of every token of the vocabulary in the place of each, given the tokens before it."""
    mass = _log_mass(log_probs)
    return mass[_NEXT] - mass[_CHAIN[:, :-1]].unsqueeze(-1)


def _log_mass(log_probs: Tensor) -> Tensor:
    """``[prefixes]``: the logarithm of the mass of what begins with each."""
    return (_BEGINS @ log_probs.exp()).clamp(min=1e-300).log()


@dataclass(frozen=True)
class Point:
    """A distribution, measured exactly. Divergences in nats."""

    step: int  # optimiser steps taken
    kl_to_bon: float  # KL(pi || pi_BoN), backward; of another target, to that
    kl_from_bon: float  # KL(pi_BoN || pi), forward
    reward: float  # E[r(y)]
    quantile: float  # E[(p_< + p_<=) / 2], the quantile of the reward under the reference; 0.5 for the reference
    kl_ref: float  # KL(pi || pi_ref)
    jeffreys: float  # half the sum of both directions, Eq. 11 of arXiv 2407.14622 at beta = 0.5


@dataclass(frozen=True)
class Problem:
    """A reference distribution over :data:`RESPONSES` and a reward.

    ``features`` are what the restricted policy can change: how many tokens 3 a response has, and whether a token 1.
    """

    log_ref: Tensor  # [S] float64, normalised
    rewards: Tensor  # [S] float64
    features: Tensor  # [S, 2] float64

    @classmethod
    def make(cls, rewards: str = "strict") -> Problem:
        """The laboratory's problem. Raises KeyError for other ``rewards`` than the two below.

        Token 3 is skill: each one raises the reward by 1/2. Token 1 is risk: with it the reward has five times
        the spread, so that the best responses have it and the worst ones too. A policy that can only have more
        or less of each cannot copy Best-of-N. Imitating Best-of-N (forward KL) takes the risk, for the best
        responses; avoiding what Best-of-N avoids (backward KL) keeps away from it, for the worst ones.

        Args:
            rewards: ``strict``, all different; ``tied``, 1 for the best of those, about a quarter of the
                reference's mass, and 0 for the others.
        """
        generator = torch.Generator().manual_seed(_PROBLEM_SEED)
        table = 0.5 * torch.randn(len(_PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)
        log_token = table.log_softmax(dim=-1)
        log_ref = torch.stack(
            [sum(log_token[_PREFIXES.index(r[:i]), r[i]] for i in range(len(r))) for r in RESPONSES]
        )
        features = torch.tensor([[r.count(3), float(1 in r)] for r in RESPONSES], dtype=torch.float64)
        noise = torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64)
        strict = features[:, 0] / 2 + noise * (1 + 4 * features[:, 1])
        _, not_higher = level_probabilities(log_ref.exp(), strict)
        values = {"strict": strict, "tied": (not_higher > 0.75).double()}
        return cls(log_ref, values[rewards], features)

    def policy(self, kind: str = "full") -> EnumerablePolicy:
        """A policy that starts at the reference: ``full`` (any distribution) or ``restricted`` (two numbers)."""
        features = {"full": torch.eye(len(RESPONSES), dtype=torch.float64), "restricted": self.features}
        return EnumerablePolicy(self.log_ref, features[kind])

    def levels(self) -> tuple[Tensor, Tensor]:
        """p_< and p_<= of each response under the reference, ``[S]`` each."""
        return level_probabilities(self.log_ref.exp(), self.rewards)

    def best_of(self, n: Goal) -> Tensor:
        """``[S]`` log pi_BoN, exactly, ties at random. A real n >= 1 fills the curve between whole ones.

        Or of another target than Best-of-N.
        """
        levels = self.levels()
        return self.log_ref + (n.log_tilt(*levels) if isinstance(n, Target) else log_bon_ratio(*levels, n))

    def measure(self, log_probs: Tensor, n: Goal, step: int = 0) -> Point:
        """Measure the distribution ``log_probs`` (``[S]``) against Best-of-n of the reference, or another target."""
        with torch.no_grad():
            target = self.best_of(n)
            mass = log_probs.exp()
            p_lt, p_le = self.levels()
            backward = (mass * (log_probs - target)).sum().item()
            forward = (target.exp() * (target - log_probs)).sum().item()
            return Point(
                step=step,
                kl_to_bon=backward,
                kl_from_bon=forward,
                reward=(mass * self.rewards).sum().item(),
                quantile=(mass * (p_lt + p_le) / 2).sum().item(),
                kl_ref=(mass * (log_probs - self.log_ref)).sum().item(),
                jeffreys=(backward + forward) / 2,
            )

    def curve(self, largest: float) -> list[tuple[float, Point]]:
        """(N, Best-of-N) for real N from 1 to ``largest``, evenly spaced in log N."""
        ns = [largest ** (i / 59) for i in range(60)]
        return [(n, self.measure(self.best_of(n), n)) for n in ns]

    def worth(self, point: Point) -> tuple[float, float]:
        """Where a policy stands beside the curve of Best-of-N (reward against KL to the reference).

        Returns:
            (N, gap): the real N whose Best-of-N is as far from the reference as the policy (at most 10,000),
            and the policy's reward minus that Best-of-N's: 0 on the curve. It can be positive: Best-of-N knows
            the order of rewards alone, and is not the most reward at its KL.
        """
        low, high = 0.0, math.log(1e4)
        for _ in range(60):
            middle = (low + high) / 2
            if self.measure(self.best_of(math.exp(middle)), 1).kl_ref < point.kl_ref:
                low = middle
            else:
                high = middle
        n = math.exp((low + high) / 2)
        return n, point.reward - self.measure(self.best_of(n), 1).reward

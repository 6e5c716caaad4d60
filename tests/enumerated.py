"""Expected gradients of an algorithm on the laboratory's policy of 40 responses, by going through all of them.

What is compared with them is written here too, by the states (prefixes) of the policy, and not by the code under
test.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from bond_plugin import registry
from bond_plugin.algorithms import Algorithm, LossInputs, assemble
from bond_plugin.bestofn.distribution import level_probabilities, log_bon_ratio
from bond_plugin.lab.problem import MASK, RESPONSES, EnumerablePolicy, Problem

SIZE = len(RESPONSES)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def f64(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def bon_log_probs(log_ref: Tensor, rewards: Tensor, n: float) -> Tensor:
    """``[..., S]`` log pi_BoN on a finite set; ties are broken uniformly at random."""
    return log_ref + log_bon_ratio(*level_probabilities(log_ref.exp(), rewards), n)


def moved(problem: Problem, seed: int, scale: float = 0.7) -> EnumerablePolicy:
    """A policy some way off the reference."""
    policy = problem.policy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.parameters += scale * torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return policy


def row_losses(
    algorithm: Algorithm,
    policy: EnumerablePolicy,
    rows: Tensor,
    advantages: Tensor,
    n: int,
    old: Tensor | None = None,
    **under: Tensor,
) -> Tensor:
    """``[P, n + f]``, the loss of each row with gradient, weighed as training weighs it.

    Args:
        algorithm: see there.
        policy: see there.
        rows: ``[P, n + f]`` places of responses.
        advantages: ``[P, n + f, A]``.
        n: samples of the policy a prompt.
        old: ``[S, A]`` log-probabilities at the start of the rollout, if the policy has moved since.
        under: ``[S, A]`` by weights.
    """
    counted = assemble.Rows(n, rows.shape[-1] - n)
    tokens, flat = policy.token_log_probs(), rows.flatten()
    name = "jbond" if algorithm.policy_loss == "ppo" else algorithm.policy_loss
    inputs = LossInputs(
        log_probs=tokens[flat],
        old_log_probs=(tokens.detach() if old is None else old)[flat],
        advantages=advantages.flatten(0, 1) * MASK[flat],
        mask=MASK[flat],
        from_source=counted.from_source(len(rows)).flatten(),
        on_policy=old is None,
        clip_low=0.2,
        clip_high=0.3,
        under={name: values[flat] for name, values in under.items()},
    )
    found = assemble.weighed_loss(registry.policy_loss(name, algorithm), inputs, counted)
    return found.row_loss.reshape(rows.shape)


def gradient(loss: Tensor, policy: EnumerablePolicy) -> Tensor:
    return torch.autograd.grad(loss, policy.parameters)[0]


def over_states(
    policy: EnumerablePolicy, visits: Tensor, other: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The divergence of next-token distributions, summed over the states that the distribution ``visits`` visits.

    Args:
        policy: with gradient.
        visits: ``[S]`` log-probabilities of responses, which are held fixed.
        other: ``[S]`` log-probabilities of the other distribution.
        divergence: of two ``[V]`` log-probabilities.
    """
    total = torch.zeros((), dtype=torch.float64)
    own = policy.log_probs()
    for state in sorted({r[:t] for r in RESPONSES for t in range(len(r))}):
        begins = torch.tensor([r[: len(state)] == state and len(r) > len(state) for r in RESPONSES])
        last = torch.tensor([r[len(state)] if there else -1 for r, there in zip(RESPONSES, begins, strict=True)])
        own_next, other_next = (
            torch.stack([p[last == token].logsumexp(0) for token in range(4)]).log_softmax(0) for p in (own, other)
        )
        total = total + visits.detach()[begins].exp().sum() * divergence(own_next, other_next)
    return total


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    middle = ((p.exp() + q.exp()) / 2).log()
    return (kl(p, middle) + kl(q, middle)) / 2


def difference_of_advantages(right: float, n: int) -> float:
    """E[A | right] - E[A | wrong] of group-normalised 0/1 rewards: what GRPO's expected gradient has before grad p.

    Args:
        right: p, the chance of a right response.
        n: samples a prompt.
    """
    total = 0.0
    for others in range(n):  # that are right
        chance = comb(n - 1, others) * right**others * (1 - right) ** (n - 1 - others)
        for own, sign in ((1, 1), (0, -1)):
            mean = (own + others) / n
            spread = (n * mean * (1 - mean) / (n - 1)) ** 0.5
            total += sign * chance * (own - mean) / spread if spread else 0.0
    return total

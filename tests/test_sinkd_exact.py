"""Losses on logits: in pieces and whole, gradients by finite differences, and the plan's constraints."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from bond_plugin.algorithms.logits import Head, Logits
from bond_plugin.algorithms.sinkd import SinKD, SinKDConfig
from bond_plugin.bestofn.divergences import transport
from bond_plugin.lab.learner import TEACHER, Training, train
from bond_plugin.lab.problem import Problem

TOKENS, WORDS = 7, 11
#: One of each of the four losses.
NONE = {"sinkhorn": 0.0, "forward_kl": 0.0}
EACH = [{**NONE, name: 1.0} for name in ("sinkhorn", "forward_kl", "backward_kl", "jensen_shannon")]


def made(limit: float = 2**28) -> Logits:
    """Models of other widths, one with a bias and a padded output layer."""
    data = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=data, dtype=torch.float64)

    policy = Head(randn(TOKENS, 3).requires_grad_(), randn(WORDS, 3).requires_grad_(), randn(WORDS).requires_grad_())
    return Logits(policy, Head(randn(TOKENS, 5), randn(WORDS + 4, 5)), temperature=0.7, limit=limit)


def both(logits: Logits) -> tuple[Tensor, Tensor]:
    """``[K, V]`` log-probabilities, at once."""
    heads = (logits.policy, logits.teacher)
    return tuple((head.logits(slice(None), slice(WORDS)) / logits.temperature).log_softmax(dim=-1) for head in heads)  # type: ignore[return-value]


@pytest.mark.parametrize("settings", EACH)
@pytest.mark.parametrize("limit", [1, 8 * WORDS * 3, 2**28])
def test_pieces_give_what_the_whole_gives(settings: dict[str, float], limit: float) -> None:
    algorithm = SinKD(SinKDConfig(**settings, block=TOKENS))
    logits = made(limit)
    own, other = both(logits)
    apart = (own.exp()[:, None] - other.exp()[None]).abs().sum(-1)
    middle = (own.exp() / 2 + other.exp() / 2).log()
    whole: dict[str, Callable[[], Tensor]] = {
        "sinkhorn": lambda: (transport(apart, 0.1, 20) * apart).sum(-1),
        "forward_kl": lambda: kl_div(own, other, reduction="none", log_target=True).sum(-1),
        "backward_kl": lambda: kl_div(other, own, reduction="none", log_target=True).sum(-1),
        "jensen_shannon": lambda: sum(
            kl_div(middle, each, reduction="none", log_target=True).sum(-1) / 2 for each in (own, other)
        ),
    }
    found, wanted = algorithm.token_losses(logits), whole[next(name for name in whole if settings.get(name))]()
    torch.testing.assert_close(found.double(), wanted)
    of = (logits.policy.hidden, logits.policy.weight, logits.policy.bias)
    weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    gradients = (torch.autograd.grad((losses * weights).sum(), of) for losses in (found, wanted))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_more_than_the_limit_is_made_at_a_time() -> None:
    sizes: list[int] = []

    def compare(own: Tensor, other: Tensor) -> Tensor:
        assert own.shape == other.shape
        sizes.append(4 * own.numel() * 2)
        return own.sum(dim=-1)

    made(8 * WORDS * 3).over_tokens(compare)
    assert max(sizes) == 8 * WORDS * 3 and len(sizes) == 3
    sizes.clear()
    made(8 * TOKENS * 4).over_words(compare)
    assert max(sizes) == 8 * TOKENS * 4 and len(sizes) == 3


@pytest.mark.parametrize("settings", EACH)
def test_gradients_are_those_of_finite_differences(settings: dict[str, float]) -> None:
    algorithm, logits = SinKD(SinKDConfig(**settings, blur=0.3, iterations=5, block=4)), made(400)
    algorithm_of = lambda hidden, weight, bias: algorithm.token_losses(  # noqa: E731
        replace(logits, policy=Head(hidden, weight, bias))
    )
    head = logits.policy
    assert torch.autograd.gradcheck(algorithm_of, (head.hidden, head.weight, head.bias))


def test_the_plan_keeps_to_its_constraints_and_becomes_the_transport() -> None:
    costs = made().distances().detach()[:5, :5]
    plain = (-costs / 0.1).exp()
    for _ in range(20):
        plain = plain / plain.sum(dim=0, keepdim=True)
        plain = plain / plain.sum(dim=1, keepdim=True)
    torch.testing.assert_close(transport(costs, 0.1, 20), plain)
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(transport(costs, 0.1, 1).sum(dim=1), ones)
    torch.testing.assert_close(transport(costs, 0.3, 1000).sum(dim=0), ones)
    best = min(sum(costs[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    # where the plain form divides 0 by 0
    assert (transport(costs, 0.002, 3000) * costs).sum().item() == pytest.approx(best.item(), abs=1e-3)
    assert (transport(costs, 1.0, 20) * costs).sum() > best + 0.05


def test_all_but_the_distance_alone_reach_the_teacher() -> None:
    problem, training = Problem.make("strict"), Training(steps=60, prompts=32, samples=4)

    def left(**settings: float) -> float:
        return train(problem, SinKD(SinKDConfig(**settings)), problem.policy("full"), TEACHER, training).end.jeffreys

    for settings in ({}, *EACH[1:]):
        assert left(**settings) < 0.05, settings
    assert left(**EACH[0]) > 1


@pytest.mark.parametrize(("settings", "said"), [
    ({"sinkhorn": 0.0, "forward_kl": 0.0}, "--bond.sinkhorn, forward_kl, backward_kl and jensen_shannon must be"),
    ({"forward_kl": -1.0}, "must be at least 0"),
    ({"blur": 0.0}, "--bond.blur must be above 0, got 0.0"),
    ({"block": 1}, "--bond.block must be at least 2, got 1"),
])  # fmt: skip
def test_settings_of_no_use_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SinKDConfig(**settings)

"""The pooled form on a policy small enough to enumerate: its expected gradient is that of its objective.

Two tokens of two letters after one another, four responses; all batches of two prompts with two or three samples each
are summed over, in float64, through what training runs: ``advantages`` and the host's own loss. The order of a batch
is of no matter, as one test shows; so each is computed in one of its orders.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bond_plugin.algorithms.base import AdvantageInputs
from bond_plugin.algorithms.bond import BOND, BONDConfig
from bond_plugin.algorithms.jbond import JBOND, JBONDConfig

# (first token, second token); the second is drawn given the first.
RESPONSES = torch.tensor(list(itertools.product((0, 1), (0, 1))))
STRICT = torch.tensor([2.0, 0.0, 3.0, 1.0], dtype=torch.float64)
TIED = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)


def tokens_of(logits: Tensor) -> Tensor:
    """``[4, 2]``: log pi of each response's tokens; ``logits`` ``[3, 2]``, of the beginning and after each token."""
    table = logits.log_softmax(-1)
    first, second = RESPONSES[:, 0], RESPONSES[:, 1]
    return torch.stack([table[0][first], table[1 + first, second]], dim=-1)


def table(seed: int, scale: float = 0.7) -> Tensor:
    return scale * torch.randn(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POLICY, ANCHOR, INITIAL = table(1).requires_grad_(), table(2), table(3)


def orders(items: tuple) -> int:
    """In how many orders they may stand."""
    return math.factorial(len(items)) // math.prod(map(math.factorial, Counter(items).values()))


def batches(prompts: int, samples: int) -> tuple[Tensor, Tensor]:
    """All batches ``[batches, P, S]``, each in one order, and their probabilities in any under the policy."""
    rows = list(itertools.combinations_with_replacement(range(4), samples))
    found = list(itertools.combinations_with_replacement(rows, prompts))
    index = torch.tensor(found)
    log_pi = tokens_of(POLICY.detach()).sum(-1)
    counts = torch.tensor([orders(batch) * math.prod(map(orders, batch)) for batch in found])
    return index, counts * log_pi[index].sum(dim=(1, 2)).exp()


def inputs(index: Tensor, rewards: Tensor) -> AdvantageInputs:
    """One batch, ``[P, S]``."""
    tables = {"policy": POLICY.detach(), "anchor": ANCHOR, "reference": INITIAL}
    return AdvantageInputs(
        rewards=rewards[index],
        source_rewards=torch.zeros(len(index), 0, dtype=torch.float64),
        under={name: tokens_of(table)[index] for name, table in tables.items()},
        generator=torch.Generator().manual_seed(0),
    )


def expected(make: object, rewards: Tensor, samples: int = 2, prompts: int = 2) -> Tensor:
    """The gradient of mean over prompts and samples of -A log pi, in expectation: ``[3, 2]``."""
    index, weight = batches(prompts, samples)
    coefficient = torch.zeros(4, 2, dtype=torch.float64)
    for batch, probability in zip(index, weight, strict=True):
        found = make(inputs(batch, rewards)).advantages
        coefficient.index_add_(0, batch.flatten(), probability * found.flatten(0, 1) / batch.numel())
    return torch.autograd.grad(-(coefficient * tokens_of(POLICY)).sum(), POLICY)[0]


def best_of(n: int, rewards: Tensor, anchor: Tensor | None = None) -> Tensor:
    """``[4]``: log pi_BoN of the anchor, ties in proportion to the anchor (Theorem 1 of arXiv 2407.14622)."""
    anchor = tokens_of(ANCHOR).sum(-1).exp() if anchor is None else anchor
    below = (anchor * (rewards.unsqueeze(1) > rewards)).sum(-1)
    level = (anchor * (rewards.unsqueeze(1) == rewards)).sum(-1)
    return (((below + level) ** n - below**n) / level * anchor).log()


def series(samples: int, rewards: Tensor) -> Tensor:
    """``[4]``: E[log F̂ | y] from k = S - 1 others: -sum_j (1 - F)^j / j, one half of the equals below."""
    anchor = tokens_of(ANCHOR).sum(-1).exp()
    above = (anchor * (rewards.unsqueeze(1) < rewards)).sum(-1)
    level = (anchor * (rewards.unsqueeze(1) == rewards)).sum(-1)
    return -sum((above + level / 2) ** j / j for j in range(1, samples))


def of_ties(n: int, rewards: Tensor, samples: int, largest: float = math.inf) -> Tensor:
    """``[4]``: what ties are expected to add, the log of a level's mean of F^(N-1) less that of its middle."""
    pi, anchor = (tokens_of(of.detach()).sum(-1).exp() for of in (POLICY, ANCHOR))
    others = torch.tensor(list(itertools.product(range(4), repeat=samples - 1)))
    weight = (anchor / pi).clamp(max=largest)[others]
    found = []
    for mine in rewards:
        below, equal = ((weight * part).sum(-1) for part in (rewards[others] < mine, rewards[others] == mine))
        low = torch.where(equal > 0, below / (below + equal), 1.0)
        mean = torch.where(low < 1, (1 - low**n) / (1 - low), n) / n
        found.append((pi[others].prod(-1) * (mean / ((1 + low) / 2) ** (n - 1)).log()).sum())
    return torch.stack(found)


def wanted(n: int, rewards: Tensor, samples: int, beta: float, gamma: float = 0.0, gamma_ref: float = 0.0) -> Tensor:
    """The gradient of (1 - beta) KL(BoN || pi) + beta E_pi[log pi / anchor - (N - 1) log F] + the two other KLs."""
    log_pi = tokens_of(POLICY).sum(-1)
    to_anchor = log_pi - tokens_of(ANCHOR).sum(-1)
    pi, target = log_pi.exp(), best_of(n, rewards)
    value = (1 - beta) * (target.exp() * (target - log_pi)).sum()
    log_tilt = (n - 1) * series(samples, rewards) + of_ties(n, rewards, samples)
    value = value + beta * (pi * (to_anchor - log_tilt)).sum()
    value = value + gamma * (pi * to_anchor).sum()
    value = value + gamma_ref * (pi * (log_pi - tokens_of(INITIAL).sum(-1))).sum()
    return torch.autograd.grad(value, POLICY)[0]


TERMS = pytest.mark.parametrize(
    ("beta", "gamma", "gamma_ref"),
    [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.3, 2.0, 0.0), (0.5, 0.0, 0.7)],
    ids=["forward", "backward", "gamma", "gamma_ref"],
)
REWARDS = pytest.mark.parametrize("rewards", [STRICT, TIED], ids=["strict", "tied"])
BASELINES = pytest.mark.parametrize("baseline", ["batch", "none"])


@REWARDS
@TERMS
@BASELINES
def test_prompts_and_samples_may_stand_in_any_order(
    rewards: Tensor, beta: float, gamma: float, gamma_ref: float, baseline: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    for algorithm in (
        JBOND(JBONDConfig(n=3, beta=beta, gamma=gamma, gamma_ref=gamma_ref, baseline=baseline)),
        JBOND(JBONDConfig(beta=beta, gamma=gamma, gamma_ref=gamma_ref, baseline=baseline, normalised=True)),
        BOND(BONDConfig(n=3, n_anchor_samples=0, beta=beta, gamma_ref=gamma_ref, anchor="ema", baseline=baseline)),
    ):
        for prompts, samples in ((1, 3), (3, 4)):
            index = torch.randint(4, (prompts, samples), generator=generator)
            found = algorithm.advantages(inputs(index, rewards)).advantages.expand(prompts, samples, 2)
            rows = torch.randperm(prompts, generator=generator)
            places = torch.rand(prompts, samples, generator=generator).argsort(dim=-1)  # of each prompt's its own
            moved = algorithm.advantages(inputs(index.gather(1, places)[rows], rewards)).advantages
            wanted = found.gather(1, places.unsqueeze(-1).expand(-1, -1, 2))[rows]
            torch.testing.assert_close(moved.expand_as(wanted), wanted, rtol=1e-10, atol=1e-12)


@REWARDS
@TERMS
@BASELINES
def test_expected_gradient_is_that_of_the_objective(
    rewards: Tensor, beta: float, gamma: float, gamma_ref: float, baseline: str
) -> None:
    config = JBONDConfig(beta=beta, gamma=gamma, gamma_ref=gamma_ref, baseline=baseline)
    found = expected(JBOND(config).advantages, rewards)
    torch.testing.assert_close(found, wanted(2, rewards, 2, beta, gamma, gamma_ref), rtol=1e-10, atol=1e-12)


@REWARDS
@pytest.mark.parametrize("n", [2, 3])
def test_more_samples_and_larger_n(n: int, rewards: Tensor) -> None:
    config = JBONDConfig(n=n, beta=0.5)
    found = expected(JBOND(config).advantages, rewards, samples=3, prompts=1)
    torch.testing.assert_close(found, wanted(n, rewards, 3, 0.5), rtol=1e-10, atol=1e-12)
    ours = BOND(BONDConfig(n=n, n_anchor_samples=0, beta=0.5, anchor="ema"))
    torch.testing.assert_close(
        expected(ours.advantages, rewards, samples=3, prompts=1), found, rtol=1e-10, atol=1e-12
    )


def test_of_three_samples_equals_count_one_half_each() -> None:
    """Two equals tell it from the mean over their random orders, which of one is one half as well."""
    found = expected(JBOND(JBONDConfig(beta=1.0)).advantages, TIED, samples=3, prompts=1)
    torch.testing.assert_close(found, wanted(2, TIED, 3, 1.0), rtol=1e-10, atol=1e-12)


def test_a_single_prompt_has_a_constant_for_its_baseline() -> None:
    config = JBONDConfig(beta=1.0)
    found = expected(JBOND(config).advantages, STRICT, samples=3, prompts=1)
    torch.testing.assert_close(found, wanted(2, STRICT, 3, 1.0), rtol=1e-10, atol=1e-12)


def test_what_came_before_a_token_does_not_depend_on_it() -> None:
    """The log-ratio's reward-to-go has the expectation of the whole log-ratio, and is something else."""

    def of(to_go: bool) -> object:
        def make(batch: AdvantageInputs) -> object:
            whole = {name: log_probs.sum(dim=-1, keepdim=True) for name, log_probs in batch.under.items()}
            found = JBOND(JBONDConfig()).advantages(batch if to_go else replace(batch, under=whole))
            return replace(found, advantages=found.advantages.expand(batch.under["policy"].shape))

        return make

    torch.testing.assert_close(expected(of(True), STRICT), expected(of(False), STRICT), rtol=1e-10, atol=1e-12)
    batch = inputs(torch.tensor([[0, 3], [1, 2]]), STRICT)
    assert not torch.allclose(of(True)(batch).advantages, of(False)(batch).advantages)


def test_self_normalised_weights_have_a_bias_that_falls_with_the_samples() -> None:
    def bias(samples: int) -> float:
        exact = wanted(2, STRICT, samples, 0.0)
        config = JBONDConfig(beta=0.0, normalised=True)
        return (expected(JBOND(config).advantages, STRICT, samples, prompts=1) - exact).norm().item()

    two, four = bias(2), bias(4)
    assert 0 < four < 0.6 * two


@pytest.mark.parametrize("n", [2, 3])
def test_cut_off_weights_have_the_cut_off_anchor_for_their_target(n: int) -> None:
    """min(anchor, c pi) in the anchor's place: both directions, and the share that is left out."""
    largest = 1.1
    pi = tokens_of(POLICY.detach()).sum(-1).exp()
    anchor = tokens_of(ANCHOR).sum(-1).exp()
    cut = anchor.minimum(largest * pi)
    assert 0.05 < 1 - cut.sum() < 0.5
    config = JBONDConfig(n=n, beta=0.0, max_weight=largest)
    log_pi = tokens_of(POLICY).sum(-1)
    exact = torch.autograd.grad(-(best_of(n, STRICT, cut).exp() * log_pi).sum(), POLICY)[0]
    found = expected(JBOND(config).advantages, STRICT, samples=3, prompts=1)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)

    above = (cut * (STRICT.unsqueeze(1) < STRICT)).sum(-1) + cut / 2
    log_quantile = -sum(above**j / j for j in (1, 2))
    log_pi = tokens_of(POLICY).sum(-1)
    log_tilt = (n - 1) * log_quantile + of_ties(n, STRICT, 3, largest)
    value = (log_pi.exp() * (log_pi - anchor.log() - log_tilt)).sum()
    exact = torch.autograd.grad(value, POLICY)[0]
    found = expected(JBOND(replace(config, beta=1.0)).advantages, STRICT, samples=3, prompts=1)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_no_sample_makes_up_a_step() -> None:
    """One response that the policy has all but forgotten: the coefficient of its gradient, and of the others'."""
    index = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 8)
    batch = inputs(index, STRICT)
    anchor = batch.under["policy"].clone()
    anchor[3, 2, 1] += 6.0  # e^6 times as likely
    batch = replace(batch, under={**batch.under, "anchor": anchor})

    def found(max_weight: float) -> tuple[float, dict[str, float]]:
        made = JBOND(JBONDConfig(max_weight=max_weight)).advantages(batch)
        return made.advantages.abs().max().item(), made.metrics

    largest, metrics = found(math.inf)
    assert largest > 200 and metrics["bond/truncated"] == 0 and metrics["bond/ess_min"] < 0.2 < metrics["bond/ess"]
    largest, metrics = found(JBONDConfig().max_weight)
    assert largest < 20 and metrics["bond/log_quantile"] > -1.5
    weights = 63 + math.exp(6.0)
    assert metrics["bond/truncated"] == pytest.approx((math.exp(6.0) - 10) / weights)
    assert metrics["bond/ess_min"] == pytest.approx(17**2 / 107 / 8)


def test_samples_of_an_earlier_policy_count_by_their_own_distribution() -> None:
    """mu drew the samples: others weigh pi_anchor / mu, and a sample's own pi / mu is left to the host."""
    log_mu = tokens_of(table(4)).sum(-1)
    index = torch.cartesian_prod(*[torch.arange(4)] * 2).unsqueeze(1)
    policy = tokens_of(POLICY.detach())
    coefficient = torch.zeros(4, 2, dtype=torch.float64)
    for batch in index:
        given = inputs(batch, STRICT)
        moved = policy.sum(-1)[batch] - log_mu[batch]
        given = replace(given, under={**given.under, "behaviour": tokens_of(table(4))[batch]})
        config = JBONDConfig(beta=0.0)
        found = JBOND(config).advantages(given).advantages * moved.exp().unsqueeze(-1)  # the host's part, untruncated
        coefficient.index_add_(0, batch.flatten(), log_mu[batch].sum().exp() * found.flatten(0, 1) / 2)
    found = torch.autograd.grad(-(coefficient * tokens_of(POLICY)).sum(), POLICY)[0]
    torch.testing.assert_close(found, wanted(2, STRICT, 2, 0.0), rtol=1e-10, atol=1e-12)


def test_ess_is_one_where_the_policy_is_the_anchor_and_less_where_it_is_not() -> None:
    batch = inputs(torch.tensor([[0, 3, 1], [1, 2, 3]]), STRICT)
    ess = JBOND(JBONDConfig()).advantages(batch).metrics["bond/ess"]
    assert 0 < ess < 1
    same = replace(batch, under={**batch.under, "anchor": batch.under["policy"]})
    found = JBOND(JBONDConfig()).advantages(same).metrics
    assert found["bond/ess"] == pytest.approx(1.0)
    assert found["bond/win_rate"] == pytest.approx(0.5) and found["bond/kl_anchor"] == 0


def test_samples_of_the_anchor_join_by_the_balance_heuristic() -> None:
    """Two of the policy and two of the anchor: near the exact gradient, which one draw of each kind is not."""
    config = JBONDConfig(n_anchor_samples=2, estimator="pooled", beta=0.5)
    algorithm = JBOND(config)
    needs = algorithm.needs()
    assert (needs.source_samples, needs.selected_samples, needs.least) == (2, 2, 1)
    index = torch.cartesian_prod(*[torch.arange(4)] * 4)
    log_pi, log_anchor = tokens_of(POLICY.detach()).sum(-1), tokens_of(ANCHOR).sum(-1)
    coefficient = torch.zeros(4, 2, dtype=torch.float64)
    for row in index:
        y, a = row[None, :2], row[None, 2:]
        assert algorithm.select(STRICT[a], torch.Generator()).tolist() == [[0, 1]]
        both = inputs(row[None], STRICT)
        found = algorithm.advantages(replace(both, rewards=STRICT[y], source_rewards=STRICT[a]))
        probability = (log_pi[y].sum() + log_anchor[a].sum()).exp()
        coefficient.index_add_(
            0, y[0], probability * found.advantages[0] / 2
        )  # the host's mean over each kind of row
        coefficient.index_add_(0, a[0], probability * found.selected_advantages[0] / 2)
    found = torch.autograd.grad(-(coefficient * tokens_of(POLICY)).sum(), POLICY)[0].flatten()
    exact = wanted(2, STRICT, 4, 0.5).flatten()
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.98
    assert found.norm() == pytest.approx(exact.norm().item(), rel=0.25)


@pytest.mark.parametrize(("settings", "says"), [
    ({"baseline": "leave_one_out"}, "change the pooled form's target"),
    ({"n_anchor_samples": 1}, "--bond.n_anchor_samples"),
    ({"estimator": "paper"}, "--bond.n_anchor_samples"),
    ({"n": 1}, "--bond.n "),
    ({"n": 4, "n_anchor_samples": 2}, "drop --bond.n"),
    ({"ties": "textbook"}, "--bond.n_anchor_samples 2"),
    ({"gamma_ref": -1.0}, "--bond.gamma_ref"),
    ({"min_ess": 2.0}, "--bond.min_ess"),
    ({"max_weight": 0.5}, "--bond.max_weight"),
    ({"max_weight": math.nan}, "--bond.max_weight"),
])  # fmt: skip
def test_settings_that_do_not_fit(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        JBONDConfig(**settings)


def test_the_loss_is_the_hosts_own_unless_samples_of_the_anchor_are_trained_on() -> None:
    assert JBOND(JBONDConfig()).policy_loss == "ppo"
    assert JBOND(JBONDConfig(n_anchor_samples=2)).policy_loss == "jbond"
    assert BOND(BONDConfig(n_anchor_samples=0)).policy_loss == "ppo"
    assert BOND(BONDConfig()).policy_loss == "jbond"
    assert math.isclose(JBONDConfig().beta, 0.5)


def test_the_log_quantile_is_reported_of_the_samples_whatever_the_target() -> None:
    """What ties add to the target's logarithm for N > 2 is no part of it."""
    batch = inputs(torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 2, 1, 0, 0]]), TIED)
    found = {JBOND(JBONDConfig(n=n)).advantages(batch).metrics["bond/log_quantile"] for n in (2, 4)}
    assert len(found) == 1

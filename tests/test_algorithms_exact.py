"""BOND, bon_sft and vBoN on a policy small enough to enumerate, through the code that training runs.

The policy has 12 responses with free logits; the anchor is another such policy. With the quantiles put in exactly
(a cache that holds every response as often as the anchor's probabilities say), the expected gradient is compared
with autograd's gradient of the exact objective.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from enumerated import bon_log_probs
from torch import Tensor

from bond_plugin.algorithms import AdvantageInputs, LossInputs
from bond_plugin.algorithms.bon_sft import BoNSFT, BoNSFTConfig
from bond_plugin.algorithms.bond import BOND, BONDConfig
from bond_plugin.algorithms.jbond import policy_loss
from bond_plugin.algorithms.vbon import VBoN, VBoNConfig
from bond_plugin.bestofn.distribution import log_bon_ratio, quantiles

SIZE = 12
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(SIZE, generator=GENERATOR, dtype=torch.float64)
# The anchor's probabilities are multiples of 1/240, so that a list of samples can have them exactly.
COUNTS = torch.tensor([40, 30, 30, 25, 25, 20, 20, 15, 15, 10, 5, 5])
ANCHOR = (COUNTS / COUNTS.sum()).double().log()
STRICT = torch.randperm(SIZE, generator=GENERATOR).double()
TIED = (STRICT > 7).double()


def population(rewards: Tensor, copies: int) -> Tensor:
    """Rewards of samples whose empirical distribution is the anchor's."""
    return rewards.repeat_interleave(COUNTS * copies)


def whole(**log_probs: Tensor) -> dict[str, Tensor]:
    """Of responses of one token."""
    return {name: values.unsqueeze(-1) for name, values in log_probs.items()}


def expected_gradient(algorithm: BOND, rewards: Tensor, pool: Tensor, n_policy: int = 1) -> Tensor:
    """The backward term's gradient, summed over all policy samples (pairs, for two) with their probabilities."""
    logits = LOGITS.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    index = torch.cartesian_prod(*[torch.arange(SIZE)] * n_policy).reshape(-1, n_policy)
    weight = log_pi.detach()[index].sum(-1).exp()
    out = algorithm.advantages(
        AdvantageInputs(
            rewards=rewards[index],
            source_rewards=rewards.new_zeros(len(index), 0),
            under=whole(policy=log_pi.detach()[index], reference=ANCHOR[index]),
            generator=torch.Generator().manual_seed(0),
            reference_rewards=pool.expand(len(index), -1),
        )
    )
    rows = log_pi[index.flatten()].unsqueeze(-1)
    loss = policy_loss(
        LossInputs(
            log_probs=rows,
            old_log_probs=rows.detach(),
            advantages=out.advantages.flatten().unsqueeze(-1),
            mask=torch.ones_like(rows),
            from_source=torch.zeros(len(rows), dtype=torch.bool),
            on_policy=True,
            clip_low=0.2,
            clip_high=0.2,
        )
    ).row_loss
    return torch.autograd.grad((loss.reshape(-1, n_policy).mean(-1) * weight).sum(), logits)[0]


def backward_gradient(target: Tensor) -> Tensor:
    """Autograd's gradient of KL(pi || target), by enumeration."""
    logits = LOGITS.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    return torch.autograd.grad((log_pi.exp() * (log_pi - target)).sum(), logits)[0]


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("rewards", [STRICT, TIED], ids=["strict", "tied"])
@pytest.mark.parametrize(("baseline", "n_policy"), [("none", 1), ("leave_one_out", 2), ("none", 2)])
def test_bond_backward_gradient_is_that_of_the_kl_to_best_of_n(
    n: int, rewards: Tensor, baseline: str, n_policy: int
) -> None:
    """With a large population the smoothed quantiles are the exact ones, and term (B) makes ties exact."""
    algorithm = BOND(BONDConfig(n=n, beta=1.0, baseline=baseline, reward_cache="-"))
    found = expected_gradient(algorithm, rewards, population(rewards, 100), n_policy)
    wanted = backward_gradient(bon_log_probs(ANCHOR, rewards, n))
    assert (found - wanted).norm() < 2e-3 * wanted.norm()
    # and without term (B) it is another gradient where rewards tie
    textbook = BOND(BONDConfig(n=n, beta=1.0, baseline=baseline, reward_cache="-", correction=False))
    other = expected_gradient(textbook, rewards, population(rewards, 100), n_policy)
    distance = (other - wanted).norm() / wanted.norm()
    assert distance > 0.02, distance  # twelve responses: each has mass, so even "strict" rewards tie with themselves


def test_beta_scales_the_two_terms() -> None:
    batch = {
        "rewards": STRICT[:6].reshape(3, 2),
        "source_rewards": STRICT[:12].reshape(3, 4),
        "under": whole(policy=LOGITS[:9].reshape(3, 3), reference=ANCHOR[:9].reshape(3, 3)),
        "generator": torch.Generator().manual_seed(0),
    }
    half, full = (
        BOND(BONDConfig(n=4, beta=beta, n_anchor_samples=4)).advantages(AdvantageInputs(**batch))
        for beta in (0.25, 1.0)
    )
    torch.testing.assert_close(half.advantages, 0.25 * full.advantages)
    assert (half.selected_advantages == 0.75).all()
    assert (full.selected_advantages == 0).all()


def test_forward_term_takes_the_best_of_the_first_n() -> None:
    rewards = torch.tensor([[0.0, 3.0, 1.0, 9.0, 9.0], [5.0, 2.0, 1.0, 7.0, 9.0]])
    chosen = BOND(BONDConfig(n=3, n_anchor_samples=5)).select(rewards, torch.Generator())
    assert chosen.tolist() == [[1], [0]]
    equal = torch.ones(20_000, 2)
    share = BOND(BONDConfig(n=2, n_anchor_samples=2)).select(equal, torch.Generator().manual_seed(1)).double().mean()
    assert share.item() == pytest.approx(0.5, abs=0.02)
    share = BoNSFT(BoNSFTConfig(n=2)).select(equal, torch.Generator().manual_seed(1)).double().mean()
    assert share.item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("settings", "drawn", "selected", "source"), [
    ({}, 16, 1, "reference"),
    ({"beta": 1.0, "n_anchor_samples": 3}, 3, 0, "reference"),
    ({"anchor": "ema"}, 16, 1, "anchor"),
    ({"anchor": "periodic", "n": 2, "n_anchor_samples": 2}, 2, 1, "anchor"),
    ({"reward_cache": "x"}, 8, 1, "reference"),
    ({"reward_cache": "x", "beta": 1.0}, 0, 0, "reference"),
    ({"quantile": "learned", "correction": False}, 8, 1, "reference"),
    ({"quantile": "learned", "correction": False, "beta": 1.0}, 1, 0, "reference"),
])  # fmt: skip
def test_only_the_samples_that_are_needed_are_drawn(settings: dict, drawn: int, selected: int, source: str) -> None:
    needs = BOND(BONDConfig(**settings)).needs()
    assert (needs.source_samples, needs.selected_samples, needs.source) == (drawn, selected, source)
    assert needs.anchor == (source == "anchor")
    assert needs.reward_cache == ("reward_cache" in settings)
    assert needs.classifier == ("quantile" in settings)


@pytest.mark.parametrize(("settings", "says"), [
    ({"n": 1}, "--bond.n must be at least 2"),
    ({"beta": -0.1}, "--bond.beta must lie in"),
    ({"n": 8, "n_anchor_samples": 4}, "--bond.n_anchor_samples 4 is less than --bond.n 8"),
    ({"n_anchor_samples": -1, "beta": 1.0}, "--bond.n_anchor_samples must be at least 0"),
    ({"n_anchor_samples": 0, "quantile": "learned", "correction": False}, "--bond.n_anchor_samples 1"),
    ({"n_anchor_samples": 0, "baseline": "leave_one_out"}, "change the pooled form's target"),
    ({"anchor_interval": 0}, "--bond.anchor_interval must be at least 1"),
    ({"eta": 2.0}, "--bond.eta must lie in"),
    ({"quantile": "learned"}, "--no-bond.correction"),
    ({"reward_cache": "x", "anchor": "ema"}, "moves away from it"),
    ({"reward_cache": "x", "quantile": "learned", "correction": False}, "two ways to the same quantile"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BONDConfig(**settings)


def test_learned_quantile_uses_the_classifier_and_labels_it_by_eq_25() -> None:
    """The optimum of the labels' cross-entropy is p_<=, and the advantage is that of the classifier's p_<=."""
    algorithm = BOND(BONDConfig(n=4, beta=1.0, quantile="learned", correction=False, baseline="none"))
    index = torch.multinomial(ANCHOR.exp(), 40_000, replacement=True, generator=torch.Generator().manual_seed(2))
    y = torch.arange(SIZE).repeat(len(index) // SIZE + 1)[: len(index)]
    logits = torch.linspace(-3, 3, SIZE, dtype=torch.float64)
    out = algorithm.advantages(
        AdvantageInputs(
            rewards=STRICT[y].unsqueeze(1),
            source_rewards=STRICT[index].unsqueeze(1),
            under=whole(policy=LOGITS.log_softmax(-1)[y].unsqueeze(1), reference=ANCHOR[y].unsqueeze(1)),
            generator=torch.Generator(),
            classifier_logits=logits[y].unsqueeze(1),
        )
    )
    _, p_le = quantiles(STRICT.unsqueeze(1), population(STRICT, 1).expand(SIZE, -1))
    for i in range(SIZE):
        labels = out.classifier_targets[y == i]
        error = labels.std().item() / math.sqrt(len(labels))
        assert labels.mean().item() == pytest.approx(p_le[i].item(), abs=5 * error + 1e-9)
    wanted = 3 * logits.sigmoid().log() - (LOGITS.log_softmax(-1) - ANCHOR)
    torch.testing.assert_close(out.advantages[:, 0], wanted[y])


@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
def test_bon_sft_is_the_forward_kl_and_a_kl_to_the_reference(kl_coef: float) -> None:
    algorithm = BoNSFT(BoNSFTConfig(n=3, kl_coef=kl_coef, baseline="none"))
    logits = LOGITS.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    out = algorithm.advantages(
        AdvantageInputs(
            rewards=STRICT.unsqueeze(1),
            source_rewards=STRICT.expand(SIZE, -1)[:, :3],
            under=whole(
                policy=log_pi.detach().unsqueeze(1).expand(-1, 2), reference=ANCHOR.unsqueeze(1).expand(-1, 2)
            ),
            generator=torch.Generator(),
        )
    )
    assert (out.selected_advantages == 1).all()
    loss = -(log_pi.detach().exp() * out.advantages[:, 0] * log_pi).sum()
    found = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(found, kl_coef * backward_gradient(ANCHOR))


@pytest.mark.parametrize("bound", ["l1", "exact", "tied"])
def test_vbon_rewards_and_coefficient(bound: str) -> None:
    """F is (k + 1) / (M + 1) with k strictly below; an increasing transformation of the reward changes nothing."""
    n, pool = 5, torch.tensor([[0.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    transform = VBoN(VBoNConfig(n=n, bound=bound, reward_cache="-"))
    assert transform.kl_coefficient == 0.25
    rewards = torch.tensor([[-1.0, 1.0, 2.0, 9.0]], dtype=torch.float64)
    log_ref = torch.tensor([[-3.0, -4.0, -5.0, -6.0]], dtype=torch.float64)
    batch = AdvantageInputs(rewards, rewards[:, :0], whole(reference=log_ref), torch.Generator(), pool)
    found = transform.transform(batch).rewards
    f = torch.tensor([[1, 2, 4, 5]], dtype=torch.float64) / 5
    wanted = {
        "l1": f.log(),
        "exact": (((f + log_ref.exp()) ** n - f**n).log() - log_ref) / (n - 1),
        "tied": log_bon_ratio(f - 0.2, torch.tensor([[1, 4, 5, 5]], dtype=torch.float64) / 5, n) / (n - 1),
    }[bound]
    torch.testing.assert_close(found, wanted)
    again = replace(batch, rewards=rewards.exp() * 3, reference_rewards=pool.exp() * 3)
    again = transform.transform(again).rewards
    torch.testing.assert_close(found, again)


def test_vbon_without_a_cache_says_how_to_make_one() -> None:
    with pytest.raises(ValueError, match="bond cache"):
        VBoNConfig()
    with pytest.raises(ValueError, match=r"--vbon.n must be at least 2"):
        VBoNConfig(n=1, reward_cache="x")

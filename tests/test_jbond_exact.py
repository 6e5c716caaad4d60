"""J-BOND as printed (Algorithm 2) on a policy small enough to enumerate: its expectation is its objective's gradient.

Vocabulary 4 (token 0 ends the response), at most 3 tokens: 40 responses. All expectations are sums over all
triples (y, y'_1, y'_2), in float64, through the code that training runs: ``select``, ``advantages`` and
``policy_loss``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bond_plugin.algorithms import assemble
from bond_plugin.algorithms.batch import AdvantageInputs, LossInputs
from bond_plugin.algorithms.jbond import JBOND, JBONDConfig, crude_log_quantile, policy_loss

VOCABULARY, LENGTH = 4, 3


def responses() -> list[tuple[int, ...]]:
    found, open_ = [], [()]
    for _ in range(LENGTH):
        longer = [(*prefix, token) for prefix in open_ for token in range(VOCABULARY)]
        found += [r for r in longer if r[-1] == 0]
        open_ = [r for r in longer if r[-1] != 0]
    return found + open_


RESPONSES = responses()
PREFIXES = sorted({r[:i] for r in RESPONSES for i in range(len(r))})
MASK = torch.tensor([[float(i < len(r)) for i in range(LENGTH)] for r in RESPONSES], dtype=torch.float64)
#: Each token and the row of its logits, ``[40, 3]``; 0 outside the mask.
TOKENS = torch.tensor([[*r, *[0] * (LENGTH - len(r))] for r in RESPONSES])
PLACES = torch.tensor([[PREFIXES.index(r[:i]) if i < len(r) else 0 for i in range(LENGTH)] for r in RESPONSES])


class Enumerable:
    """A table of logits for each prefix."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = (
            torch.randn(len(PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64) * scale
        ).requires_grad_()

    def token_log_probs(self) -> Tensor:
        """``[40, 3]``; what stands outside the mask is rubbish on purpose, as padding may be."""
        return self.logits.log_softmax(-1)[PLACES, TOKENS].masked_fill(MASK == 0, 7.0)

    def log_probs(self) -> Tensor:
        return (self.token_log_probs() * MASK).sum(-1)


def test_the_policy_is_a_distribution() -> None:
    assert len(RESPONSES) == 40
    assert Enumerable(0).log_probs().exp().sum().item() == pytest.approx(1.0, abs=1e-12)


POLICY, ANCHOR = Enumerable(1), Enumerable(2)
STRICT = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TIED = (STRICT > 0.5).double()


def triples() -> tuple[Tensor, Tensor]:
    size = len(RESPONSES)
    index = torch.cartesian_prod(*[torch.arange(size)] * 3)
    with torch.no_grad():
        weight = (
            POLICY.log_probs()[index[:, 0]] + ANCHOR.log_probs()[index[:, 1]] + ANCHOR.log_probs()[index[:, 2]]
        ).exp()
    return index, weight


def paper(**settings: float | str) -> JBONDConfig:
    """Algorithm 2 as printed."""
    return JBONDConfig(n_anchor_samples=2, **settings)


def estimate(config: JBONDConfig, rewards: Tensor, index: Tensor, weight: Tensor, seed: int = 0) -> Tensor:
    """The gradient that training would take, in expectation: ``weight`` over the triples ``index``."""
    algorithm, generator = JBOND(config), torch.Generator().manual_seed(seed)
    rewards_of = rewards[index]
    with torch.no_grad():
        places = assemble.select(algorithm, 1, rewards_of[:, 1:], generator)
        rows = index.gather(1, places)
        under = {
            name: (model.token_log_probs() * MASK)[rows] for name, model in (("policy", POLICY), ("anchor", ANCHOR))
        }
        found = assemble.advantages(
            algorithm, AdvantageInputs(rewards_of[:, :1], rewards_of[:, 1:], under, generator)
        )
    flat, shape = rows.flatten(), assemble.Rows(1, 1)
    tokens = POLICY.token_log_probs()[flat]
    inputs = LossInputs(
        log_probs=tokens,
        old_log_probs=tokens.detach(),
        advantages=found.advantages.flatten(0, 1) * MASK[flat],
        mask=MASK[flat],
        from_source=shape.from_source(len(index)).flatten(),
        on_policy=True,
        clip_low=0.2,
        clip_high=0.2,
    )
    row_loss = assemble.weighed_loss(policy_loss, inputs, shape).row_loss.reshape(rows.shape)
    return torch.autograd.grad((row_loss.sum(dim=-1) * weight).sum(), POLICY.logits)[0]


def objective(beta: float, gamma: float, rewards: Tensor) -> Tensor:
    """(1 - beta) E[-log pi(best)] + beta (KL(pi || anchor) - E_pi[r]) + gamma KL(pi || anchor), by enumeration.

    r(y) is the expectation of Eq. 17 over the anchor's pairs, ties ordered at random: y is below all with
    probability 1 / (1 + number of anchor samples equal to it), if none is below it.
    """
    log_pi, log_anchor = POLICY.log_probs(), ANCHOR.log_probs().detach()
    anchor = log_anchor.exp()
    pair = anchor.unsqueeze(0) * anchor.unsqueeze(1)
    r1, r2 = rewards.unsqueeze(0), rewards.unsqueeze(1)
    first = (r1 > r2).double() + 0.5 * (r1 == r2).double()
    forward = -(pair * (first * log_pi.unsqueeze(0) + (1 - first) * log_pi.unsqueeze(1))).sum()
    mine = rewards.reshape(-1, 1, 1)
    equal = (r1 == mine).double() + (r2 == mine).double()
    none_below = ((r1 >= mine) & (r2 >= mine)).double()
    reward = -math.log(16) * (pair * none_below / (1 + equal)).sum(dim=(1, 2))
    pi = log_pi.exp()
    kl = (pi * (log_pi - log_anchor)).sum()
    return (1 - beta) * forward + beta * (kl - (pi * reward).sum()) + gamma * kl


def gradient(beta: float, gamma: float, rewards: Tensor) -> Tensor:
    return torch.autograd.grad(objective(beta, gamma, rewards), POLICY.logits)[0]


@pytest.mark.parametrize(
    ("beta", "gamma"),
    [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.3, 2.0)],
    ids=["forward", "backward", "forward+gamma", "jeffreys", "all"],
)
def test_expected_gradient_is_the_gradient_of_the_objective(beta: float, gamma: float) -> None:
    """Distinct rewards tie all the same where a response is drawn twice: the reward is the mean over their orders."""
    index, weight = triples()
    found = estimate(paper(beta=beta, gamma=gamma, baseline="none"), STRICT, index, weight)
    torch.testing.assert_close(found, gradient(beta, gamma, STRICT), rtol=1e-10, atol=1e-12)


def test_ties_are_broken_at_random_and_not_by_position() -> None:
    index, weight = triples()
    config = paper(beta=0.5, gamma=0.0, baseline="none")
    draws = torch.stack([estimate(config, TIED, index, weight, seed=s) for s in range(20)])
    error = draws.std(0) / math.sqrt(len(draws))
    wanted = gradient(0.5, 0.0, TIED)
    assert ((draws.mean(0) - wanted).abs() / (error + 1e-9)).max() < 5
    # The expectation is the same for a choice by position, so look at the choice itself.
    equal = torch.ones(20_000, 2)
    chosen = JBOND(config).select(equal, torch.Generator().manual_seed(1))
    assert chosen.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(chosen, JBOND(config).select(equal, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("baseline", "n"), [("none", 2), ("batch", 1), ("batch", 2)])
def test_monte_carlo_mean_agrees_within_its_error(baseline: str, n: int) -> None:
    """Batches as training draws them: 8 prompts, n policy samples and 2 anchor samples each."""
    config = paper(beta=0.5, gamma=0.5, baseline=baseline)
    algorithm = JBOND(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        log_pi, log_anchor = POLICY.log_probs(), ANCHOR.log_probs()
        tokens = {"policy": POLICY.token_log_probs() * MASK, "anchor": ANCHOR.token_log_probs() * MASK}
        jacobian = torch.autograd.functional.jacobian(
            lambda logits: _log_probs_of(logits), POLICY.logits.detach()
        ).flatten(1)
    prompts, batches, shape = 8, 3000, assemble.Rows(n, 1)
    gradients = []
    for _ in range(batches):
        y = torch.multinomial(log_pi.exp(), prompts * n, replacement=True, generator=generator).reshape(prompts, n)
        a = torch.multinomial(log_anchor.exp(), prompts * 2, replacement=True, generator=generator)
        a = a.reshape(prompts, 2)
        rows = torch.cat([y, a], dim=1).gather(1, assemble.select(algorithm, n, STRICT[a], generator))
        under = {name: of_tokens[rows] for name, of_tokens in tokens.items()}
        found = assemble.advantages(algorithm, AdvantageInputs(STRICT[y], STRICT[a], under, generator))
        share = shape.weights(shape.from_source(prompts))
        coefficient = torch.zeros(len(RESPONSES), dtype=torch.float64)
        coefficient.index_add_(0, rows.flatten(), (found.advantages[..., 0] * share).flatten())
        gradients.append(-(coefficient / prompts) @ jacobian)
    gradients = torch.stack(gradients)
    wanted = gradient(0.5, 0.5, STRICT).flatten()
    error = gradients.std(0) / math.sqrt(batches)
    z = (gradients.mean(0) - wanted) / (error + 1e-12)
    assert z.abs().max() < 5
    assert error.norm() < 0.05 * wanted.norm()


def _log_probs_of(logits: Tensor) -> Tensor:
    other = Enumerable(0)
    other.logits = logits
    return other.log_probs()


def test_off_policy_loss_has_the_on_policy_gradient_at_the_old_policy_and_clips_away_from_it() -> None:
    rows = torch.arange(40)
    advantages = torch.randn(40, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * MASK
    from_source = rows % 4 == 0

    def gradient_at(shift: float, on_policy: bool) -> tuple[Tensor, float]:
        tokens = POLICY.token_log_probs()
        out = policy_loss(
            LossInputs(tokens, (tokens - shift).detach(), advantages, MASK, from_source, on_policy, 0.2, 0.3)
        )
        return torch.autograd.grad(out.row_loss.sum(), POLICY.logits)[0], out.clip_fraction.item()

    on, _ = gradient_at(0.0, True)
    off, clipped = gradient_at(0.0, False)
    torch.testing.assert_close(on, off, rtol=1e-12, atol=1e-14)
    assert clipped == 0.0

    far, clipped = gradient_at(math.log(1.5), False)  # every ratio is 1.5: beyond 1.3
    gaining = ((advantages > 0) & ~from_source.unsqueeze(-1) & MASK.bool()).sum() / MASK.sum()
    assert clipped == pytest.approx(gaining.item())
    # What is left: source samples as they are, losing samples with their ratio of 1.5, winning ones not at all.
    kept = torch.where(from_source.unsqueeze(-1), 1.0, torch.where(advantages < 0, 1.5, 0.0))
    tokens = POLICY.token_log_probs()
    wanted = torch.autograd.grad(-(tokens * advantages * kept * MASK).sum(), POLICY.logits)[0]
    torch.testing.assert_close(far, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_crude_log_quantile_matches_log_p_at_one_half(m: int) -> None:
    """Appendix A.4: E[r] = -2^m log 2 (1 - p)^m, which is log(1/2) where p is 1/2."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(400_000, m, generator=generator, dtype=torch.float64)
    found = crude_log_quantile(torch.full((400_000, 1), 0.5, dtype=torch.float64), anchors)
    assert found.min().item() == pytest.approx(-(2**m) * math.log(2))
    assert found.mean().item() == pytest.approx(math.log(0.5), abs=6 * found.std().item() / math.sqrt(400_000))
    if m == 2:
        assert found.min().item() == pytest.approx(-math.log(16))

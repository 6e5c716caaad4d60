"""DPH-RL on a policy that can be enumerated: which divergence its loss is, who is held, where it comes to rest."""

from __future__ import annotations

import pytest
import torch
from enumerated import (
    SIZE,
    difference_of_advantages,
    gradient,
    jensen_shannon,
    kl,
    moved,
    over_states,
    row_losses,
)
from torch import Tensor

from bond_plugin.algorithms import AdvantageInputs, AdvantageOutputs, assemble
from bond_plugin.algorithms.dph import DPH, DPHConfig
from bond_plugin.lab.learner import Training, train
from bond_plugin.lab.problem import Problem

TIED = Problem.make("tied")
REFERENCE = TIED.policy().token_log_probs().detach()
ALL, NONE = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)


def build(**settings: object) -> DPH:
    return DPH(DPHConfig(reward_cache="-", **settings))


def assembled(algorithm: DPH, rows: Tensor, cached: Tensor, tokens: Tensor, rewards: Tensor) -> AdvantageOutputs:
    """Two samples of the policy and a stored response for each prompt."""
    own = (torch.arange(rows.shape[-1]) < 2).unsqueeze(-1)
    under = {"policy": tokens[rows], "behaviour": torch.where(own, tokens[rows], REFERENCE[rows])}
    inputs = AdvantageInputs(
        rewards[rows[:, :2]], rewards[rows[:, 2:]], under, torch.Generator(), cached.expand(len(rows), -1)
    )
    return assemble.advantages(algorithm, inputs)


def stored_gradient(algorithm: DPH, chance: Tensor) -> Tensor:
    """The expected gradient on a prompt of D_pef whose stored responses come with these probabilities, at a policy
    that has moved since the rollout.
    """
    start, policy = moved(TIED, 3).token_log_probs().detach(), moved(TIED, 1)
    good, bad = int(TIED.rewards.argmax()), int(TIED.rewards.argmin())
    rows = torch.stack([torch.full((SIZE,), good), torch.full((SIZE,), bad), torch.arange(SIZE)], dim=-1)
    found = assembled(algorithm, rows, ALL, start, TIED.rewards)
    losses = row_losses(algorithm, policy, rows, found.advantages, n=2, old=start, behaviour=REFERENCE)
    assert (losses[:, :2] == 0).all()  # the policy's samples teach nothing there
    return gradient((chance * losses.sum(dim=-1)).sum(), policy)


def exact_gradient(divergence: str, level: str) -> Tensor:
    """Of D_f(pi || pi_ref), or of its sum over the states that the reference visits."""
    policy = moved(TIED, 1)
    if level == "sequence":
        log_pi = policy.log_probs()
        value = kl(TIED.log_ref, log_pi) if divergence == "forward_kl" else jensen_shannon(log_pi, TIED.log_ref)
    else:
        of = {"forward_kl": lambda own, other: kl(other, own), "jensen_shannon": jensen_shannon}[divergence]
        value = over_states(policy, TIED.log_ref, TIED.log_ref, of)
    return gradient(value, policy)


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_stored_responses_have_the_gradient_of_the_divergence_at_every_optimiser_step(
    divergence: str, level: str
) -> None:
    """Of tokens the forward KL is the same, Jensen-Shannon another: the one over the states of the reference."""
    found = stored_gradient(build(divergence=divergence, level=level, eta=0.3), TIED.log_ref.exp())
    torch.testing.assert_close(found / 0.3, exact_gradient(divergence, level), rtol=0, atol=1e-9)
    other = exact_gradient(divergence, {"token": "sequence", "sequence": "token"}[level])
    same = (found / 0.3 - other).norm() < 1e-9
    assert same == (divergence == "forward_kl")


def test_the_divergence_in_nats_and_its_bounds() -> None:
    log_pi, js = moved(TIED, 1).log_probs().detach(), build(divergence="jensen_shannon")
    log_ratios = moved(TIED, 1).token_log_probs().detach() - REFERENCE
    value = TIED.log_ref.exp() @ js.divergence(log_ratios)
    assert value.item() == pytest.approx(jensen_shannon(log_pi, TIED.log_ref).item())
    far = js.divergence(torch.tensor([[-500.0], [0.0], [500.0]]))
    assert far[0].item() == pytest.approx(0.5 * 0.693147, abs=1e-5)
    assert far[1].item() == 0 and torch.isfinite(far[2])


def test_responses_that_were_all_found_right_are_samples_of_the_reference_given_right() -> None:
    """What one of M has for a distribution, given that all are right; the forward KL is to that."""
    given = (TIED.log_ref + TIED.rewards.log()).log_softmax(dim=-1).exp()
    policy = moved(TIED, 1)
    wanted = gradient(-(given * policy.log_probs()).sum(), policy)
    torch.testing.assert_close(stored_gradient(build(eta=1.0), given), wanted, rtol=0, atol=1e-9)


def test_there_is_no_kl_where_there_is_something_to_learn() -> None:
    """All pairs of samples, on a prompt whose stored responses are not all right."""
    policy, algorithm = moved(TIED, 1), build()
    pairs = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))
    rows = torch.cat([pairs, pairs[:, :1]], dim=-1)
    cached = torch.cat([ALL[:7], NONE[:1]])
    found = assembled(algorithm, rows, cached, policy.token_log_probs().detach(), TIED.rewards)
    chance = policy.log_probs()[pairs].detach().sum(dim=-1).exp()
    losses = row_losses(algorithm, policy, rows, found.advantages, n=2, behaviour=REFERENCE)
    assert (losses[:, 2] == 0).all()
    right = policy.log_probs().exp() @ TIED.rewards
    wanted = gradient(-difference_of_advantages(right.item(), 2) * right, policy)
    torch.testing.assert_close(gradient((chance * losses.sum(-1)).sum(), policy), wanted, rtol=0, atol=1e-9)
    assert found.metrics == {"bond/held": 0.0}


def test_the_clip_is_the_runs_and_of_the_policys_samples_alone() -> None:
    """A policy so far off that every ratio is beyond the clip: what is left is what pulls back."""
    start, policy = REFERENCE, moved(TIED, 1, scale=3.0)
    good, bad = int(TIED.rewards.argmax()), int(TIED.rewards.argmin())
    rows = torch.tensor([[good, bad, good]])
    found = assembled(build(), rows, NONE, start, TIED.rewards)
    losses = row_losses(build(), policy, rows, found.advantages, n=2, old=start, behaviour=REFERENCE)
    tokens, mask = policy.token_log_probs(), REFERENCE != 0
    for row, sign in ((good, 1.0), (bad, -1.0)):
        ratio = (tokens - start)[row].exp()
        bounded = torch.minimum(sign * ratio, sign * ratio.clamp(0.8, 1.3)) / 2**0.5
        loss = losses[0, 0] if sign > 0 else losses[0, 1]
        assert loss.item() == pytest.approx(-(bounded * mask[row]).sum().item() / 2)


def test_who_is_held_and_what_is_shown_of_them() -> None:
    """Three prompts with 8, 7 and 0 of 8 stored responses right; the mean is over all of a step's prompts."""
    cached = torch.stack([ALL, torch.cat([ALL[:7], NONE[:1]]), NONE])
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    stored = torch.tensor([[[-1.0, -1.0]], [[-2.0, 0.0]], [[-3.0, 0.0]]], dtype=torch.float64)
    own = torch.full((3, 2, 2), -0.25, dtype=torch.float64)
    under = {"policy": torch.cat([own, stored], dim=1), "behaviour": torch.full((3, 3, 2), -0.5, dtype=torch.float64)}
    batch = AdvantageInputs(rewards, torch.ones(3, 1), under, torch.Generator(), cached)
    found = build(eta=0.3).advantages(batch)
    assert found.selected_advantages.tolist() == [[0.3], [0.0], [0.0]]
    torch.testing.assert_close(found.advantages[:, 0], torch.tensor([0.0, 0.5**0.5, 0.0]).double())
    assert found.metrics == pytest.approx({"bond/held": 1 / 3, "bond/divergence": 1.0, "bond/kept": 0.5})
    looser = build(solved=7 / 8).advantages(batch)
    assert looser.selected_advantages[:, 0].bool().tolist() == [True, True, False]


def test_training_comes_to_rest_where_it_should() -> None:
    """Of all prompts the share h is held: (1 - h) GRPO's gradient and h eta (pi_ref - pi) cancel."""
    algorithm, policy = build(eta=1.0, solved=0.25, n_stored=8), TIED.policy()
    shares = []
    original = algorithm.advantages
    algorithm.advantages = lambda batch: (out := original(batch), shares.append(out.metrics["bond/held"]))[0]
    train(TIED, algorithm, policy, 4, Training(steps=300, lr=0.1, prompts=512, cached=8, seed=7))
    (held,) = set(shares)
    right = TIED.log_ref.exp() @ TIED.rewards
    low, high = right.item(), 1.0
    for _ in range(60):  # pi = h eta pi_ref / (h eta - (1 - h) d (r - p)), with p its own share of right responses
        p = (low + high) / 2
        teaching = (1 - held) * difference_of_advantages(p, 8)
        pull = held - teaching * (TIED.rewards - p)
        there = pull.min() > 0 and (TIED.log_ref.exp() * TIED.rewards / pull).sum() * held <= p
        low, high = (low, p) if there else (p, high)
    rest = (TIED.log_ref.exp() * held / pull).log()
    assert rest.exp().sum().item() == pytest.approx(1)
    assert kl(policy.log_probs().detach(), rest) < 2e-3


@pytest.mark.parametrize(("settings", "says"), [
    ({"eta": -1.0}, "--bond.eta must be at least 0"),
    ({"solved": 8.0}, "--bond.solved must lie in"),
    ({"n_stored": 0}, "--bond.n_stored must be at least 1"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(**settings)

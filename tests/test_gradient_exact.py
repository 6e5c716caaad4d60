"""pkpo, maxrl and posterior on a policy small enough to enumerate: their expected gradients are those of objectives.

The policy is that of test_pooled_exact.py: two tokens of two letters, four responses. All draws of n samples are
summed over, in float64, through what training runs: ``assemble`` and PPO's ratio. Then the laboratory trains each to
its exact optimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pooled_exact import INITIAL, POLICY, STRICT, TIED, table, tokens_of
from torch import Tensor

from bond_plugin.algorithms import AdvantageInputs, Algorithm, DataError, LossInputs, assemble
from bond_plugin.algorithms.jbond import policy_loss
from bond_plugin.algorithms.maxrl import MaxRL
from bond_plugin.algorithms.pkpo import PKPO, PKPOConfig
from bond_plugin.algorithms.posterior import Posterior, PosteriorConfig
from bond_plugin.bestofn.baselines import centre
from bond_plugin.bestofn.estimates import max_credit
from bond_plugin.cli.main import main
from bond_plugin.lab.learner import Training, train
from bond_plugin.lab.problem import Problem

LAB = {name: Problem.make(name) for name in ("strict", "tied")}
both = pytest.mark.parametrize("rewards", [STRICT, TIED], ids=["strict", "tied"])


def expected(algorithm: Algorithm, rewards: Tensor, n: int, behaviour: Tensor | None = None) -> Tensor:
    """The gradient of the loss in expectation over all n samples of a prompt: ``[3, 2]``.

    With ``behaviour``, log-probabilities of tokens ``[4, 2]``, it drew them, and each row's loss has its pi / mu.
    """
    tokens, index = tokens_of(POLICY), torch.cartesian_prod(*[torch.arange(4)] * n).reshape(-1, n)
    drawn = tokens.detach() if behaviour is None else behaviour
    under = {"policy": tokens.detach()[index], "reference": tokens_of(INITIAL)[index]}
    if behaviour is not None:
        under["behaviour"] = behaviour[index]
    source = rewards.new_zeros(len(index), 0)
    found = assemble.advantages(algorithm, AdvantageInputs(rewards[index], source, under, torch.Generator()))
    flat = index.flatten()
    inputs = LossInputs(
        log_probs=tokens[flat],
        old_log_probs=tokens.detach()[flat],
        advantages=found.advantages.flatten(0, 1),
        mask=torch.ones_like(tokens[flat]),
        from_source=torch.zeros(len(flat), dtype=torch.bool),
        on_policy=False,
        clip_low=0.2,
        clip_high=0.2,
    )
    loss = policy_loss(inputs).row_loss.reshape(-1, n)
    moved = (tokens.detach() - drawn).sum(-1)[index].exp()
    weight = drawn.sum(-1)[index].sum(-1).exp()
    return torch.autograd.grad(((loss * moved).mean(-1) * weight).sum(), POLICY)[0]


def gradient_of(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Autograd's, of a function of ``[4]`` log pi."""
    return torch.autograd.grad(objective(tokens_of(POLICY).sum(-1)), POLICY)[0]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def pull(log_pi: Tensor) -> Tensor:
    return kl(log_pi, tokens_of(INITIAL).sum(-1))


def max_at(k: int, rewards: Tensor, log_pi: Tensor) -> Tensor:
    """E[max of k]: each level times what the maximum's distribution function rises by there."""
    pi, levels = log_pi.exp(), rewards.unique()
    not_above = torch.stack([pi[rewards <= level].sum() for level in levels]) ** k
    return (levels * torch.diff(not_above, prepend=not_above.new_zeros(1))).sum()


def log_series(order: int, rewards: Tensor, log_pi: Tensor) -> Tensor:
    """-sum_{j=1..order} (1 - p)^j / j: the series of log p."""
    fails = 1 - log_pi.exp()[rewards == 1].sum()
    return -sum(fails**j / j for j in range(1, order + 1))


def lab(algorithm: Algorithm, rewards: str, **training: Any) -> Tensor:
    """``[40]``: log pi at the end of a training of the policy that can be any distribution."""
    policy = LAB[rewards].policy("full")
    train(LAB[rewards], algorithm, policy, 4, Training(**{"seed": 7, **training}))
    return policy.log_probs().detach()


def optimum(problem: Problem, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """``[40]``: log pi of the largest ``objective``, by L-BFGS."""
    logits = problem.log_ref.clone().requires_grad_()
    solver = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = -objective(logits.log_softmax(-1))
        loss.backward()
        return loss

    solver.step(closure)
    assert logits.grad.norm() < 1e-5
    return logits.detach().log_softmax(-1)


# pkpo


@both
@pytest.mark.parametrize("gamma_ref", [0.0, 0.7])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (5, 1), (5, 2), (5, 3), (5, 5)])
def test_pkpo_has_the_gradient_of_the_best_of_k(rewards: Tensor, n: int, k: int, gamma_ref: float) -> None:
    found = expected(PKPO(PKPOConfig(k=k, gamma_ref=gamma_ref)), rewards, n)
    wanted = gradient_of(lambda log_pi: gamma_ref * pull(log_pi) - max_at(k, rewards, log_pi))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def by_subsets(rewards: list[float], k: int) -> Tensor:
    """The definition of ``max_credit``, all subsets one by one."""
    found = []
    for i, own in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        held = [max(own, *subset) if subset else own for subset in itertools.combinations(others, k - 1)]
        left = [max(subset) for subset in itertools.combinations(others, min(k, len(others)))]
        found.append(k * (sum(held) / len(held) - sum(left) / len(left)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_max_credit_is_the_mean_over_subsets(n: int) -> None:
    rewards = torch.randn(20, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    rewards[10:] = rewards[10:].round()
    for k in range(1, n + 1):
        wanted = torch.stack([by_subsets(row, k) for row in rewards.tolist()])
        torch.testing.assert_close(max_credit(rewards, k), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 31, 63])
def test_max_credit_is_stable_for_many_samples(k: int) -> None:
    """Against weights that are ratios of whole numbers, for large rewards that differ little."""
    n = 64
    rewards = 1e4 + torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).sort().values
    r = (rewards - 1e4).tolist()
    held, left, wanted = math.comb(n - 1, k - 1), math.comb(n - 1, k), []
    for i in range(n):
        own = math.comb(i, k - 1) / held * r[i]
        own += sum((math.comb(j - 1, k - 2) / held if k > 1 else 0) * r[j] for j in range(i + 1, n))
        rest = sum(math.comb(j, k - 1) / left * r[j] for j in range(i))
        rest += sum(math.comb(j - 1, k - 1) / left * r[j] for j in range(i + 1, n))
        wanted.append(k * (own - rest))
    found = max_credit(rewards, k)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert abs(found.sum().item()) < 1e-9


def test_k_1_is_reinforce_with_a_leave_one_out_baseline() -> None:
    rewards = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    under = dict.fromkeys(("policy",), torch.zeros(4, 8, 3, dtype=torch.float64))
    batch = AdvantageInputs(rewards, rewards[:, :0], under, torch.Generator())
    found = PKPO(PKPOConfig(k=1)).advantages(batch)
    torch.testing.assert_close(found.advantages, centre(rewards, "leave_one_out"), rtol=1e-13, atol=1e-13)
    assert found.metrics["bond/max_at_k"] == pytest.approx(rewards.mean().item())
    assert (max_credit(torch.full((2, 8), 0.3), 3) == 0).all()


@pytest.mark.parametrize("k", [1, 4])
def test_pkpo_ends_at_the_optimum(k: int) -> None:
    """Of E[max of k] - KL / 2; those of k = 1 and k = 4 are far from one another."""
    problem = LAB["strict"]
    best, other = (
        optimum(problem, lambda log_pi, k=k: max_at(k, problem.rewards, log_pi) - kl(log_pi, problem.log_ref) / 2)
        for k in (k, 5 - k)
    )
    found = lab(PKPO(PKPOConfig(k=k, gamma_ref=0.5)), "strict")
    assert kl(found, best) < 3e-3
    assert kl(found, other) > 0.1


# maxrl


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("gamma_ref", [0.0, 0.7])
def test_maxrl_has_the_gradient_of_the_series_of_the_logarithm_cut_at_n_less_one(n: int, gamma_ref: float) -> None:
    found = expected(MaxRL(MaxRL.Config(gamma_ref=gamma_ref)), TIED, n)

    def wanted(order: int) -> Tensor:
        return gradient_of(lambda log_pi: gamma_ref * pull(log_pi) - log_series(order, TIED, log_pi))

    torch.testing.assert_close(found, wanted(n - 1), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, wanted(n), rtol=0.03)  # what the theorem of the paper says of n samples
    passes = -sum(max_at(j, TIED, tokens_of(POLICY).sum(-1)) / j for j in range(1, n))
    if not gamma_ref:
        torch.testing.assert_close(found, torch.autograd.grad(passes, POLICY)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("samples", [2, 8])
def test_maxrl_ends_at_the_optimum(samples: int) -> None:
    """Where the slope of the series at p is gamma_ref times the distance of logit p from the reference's."""
    problem = LAB["tied"]

    def best(order: int) -> Tensor:
        return optimum(
            problem,
            lambda log_pi: log_series(order, problem.rewards, log_pi) - kl(log_pi, problem.log_ref),
        )

    found = lab(MaxRL(MaxRL.Config(gamma_ref=1.0)), "tied", samples=samples, prompts=2048 // samples)
    assert kl(found, best(samples - 1)) < 1e-3
    if samples == 2:
        assert kl(found, best(2)) > 0.005


@pytest.mark.parametrize("wrong", [0.5, -1.0, math.nan])
def test_maxrl_refuses_rewards_that_are_not_right_or_wrong(wrong: float) -> None:
    rewards = torch.tensor([[0.0, 1.0, wrong]], dtype=torch.float64)
    batch = AdvantageInputs(rewards, rewards[:, :0], {}, torch.Generator())
    with pytest.raises(DataError, match=rf"0 or 1 for maxrl, got {wrong:g} .*threshold.*overlong.*pkpo"):
        MaxRL(MaxRL.Config()).advantages(batch)


def test_maxrl_says_how_many_prompts_teach_nothing() -> None:
    rewards = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 1]], dtype=torch.float64)
    found = MaxRL(MaxRL.Config()).advantages(AdvantageInputs(rewards, rewards[:, :0], {}, torch.Generator()))
    wanted = torch.tensor([[0, 0, 0], [0, 0, 0], [-1, -1, 2], [-1, 0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(found.advantages, wanted)
    assert found.metrics == {"bond/pass_at_n": 0.75, "bond/no_signal": 0.5}


# posterior


C = 2.0


def posterior(log_ref: Tensor, rewards: Tensor, c: float) -> Tensor:
    return (log_ref + rewards / c).log_softmax(-1)


def parts(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The exact gradients of KL(p* || pi) and KL(pi || p*)."""
    target = posterior(tokens_of(INITIAL).sum(-1), rewards, C)
    return gradient_of(lambda log_pi: kl(target, log_pi)), gradient_of(lambda log_pi: kl(log_pi, target))


def stretch(rewards: Tensor, n: int, log_mu: Tensor | None = None) -> float:
    """E[Z / Z_i], with Z_i the mean weight of n - 1 samples."""
    log_pi = tokens_of(POLICY.detach()).sum(-1) if log_mu is None else log_mu
    weights = (tokens_of(INITIAL).sum(-1) + rewards / C - log_pi).exp()
    others = torch.cartesian_prod(*[torch.arange(4)] * (n - 1)).reshape(-1, n - 1)
    total = (log_pi.exp() * weights).sum()
    return (log_pi[others].sum(-1).exp() * total / weights[others].mean(-1)).sum().item()


@both
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("moved", [False, True], ids=["own", "earlier"])
def test_posterior_has_the_gradient_of_the_divergence(rewards: Tensor, n: int, beta: float, moved: bool) -> None:
    """The backward part exactly; the forward part times E[Z / Z_i], a number that falls to 1 with n."""
    mu = tokens_of(table(4)) if moved else None
    method = Posterior(PosteriorConfig(kl_coef=C, beta=beta, max_weight=math.inf))
    found = expected(method, rewards, n, mu)
    forward, backward = parts(rewards)
    longer = stretch(rewards, n, mu.sum(-1) if moved else None)
    wanted = C * ((1 - beta) * longer * forward + beta * backward)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_forward_part_is_the_longer_the_fewer_samples() -> None:
    few, some, many = (stretch(STRICT, n) - 1 for n in (3, 5, 8))
    assert 1 > few > some > many > 0
    assert many < 0.5 * few


class SelfNormalised(Posterior):
    """What the docstring says leave-one-out is better than."""

    def advantages(self, batch: AdvantageInputs) -> Any:
        log_w = batch.rewards / C - batch.log_ratio("reference")
        found = super().advantages(batch)
        return replace(found, advantages=C * (batch.n * log_w.softmax(-1) - 1))


def test_self_normalised_weights_turn_the_gradient_and_leave_one_out_does_not() -> None:
    exact = C * parts(STRICT)[0].flatten()
    config = PosteriorConfig(kl_coef=C, beta=0.0, max_weight=math.inf)

    def off(method: type[Posterior], n: int) -> tuple[float, float]:
        found = expected(method(config), STRICT, n).flatten()
        sine = (1 - torch.cosine_similarity(found, exact, dim=0) ** 2).clamp(min=0).sqrt()
        return (found.norm() / exact.norm()).item(), sine.item()

    length, turned = zip(*(off(SelfNormalised, n) for n in (3, 6)), strict=True)
    assert length[0] < length[1] < 1 and turned[0] > 1.5 * turned[1] > 0.02
    length, turned = zip(*(off(Posterior, n) for n in (3, 6)), strict=True)
    assert length[0] > length[1] > 1 and max(turned) < 1e-6


@pytest.mark.parametrize(("rewards", "c"), [("strict", 2.0), ("tied", 0.5)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0], ids=["forward", "jeffreys", "backward"])
def test_posterior_ends_at_the_target(rewards: str, c: float, beta: float) -> None:
    problem = LAB[rewards]
    target = posterior(problem.log_ref, problem.rewards, c)
    assert kl(target, problem.log_ref) > 0.4
    found = lab(Posterior(PosteriorConfig(kl_coef=c, beta=beta)), rewards, steps=320)
    assert kl(found, target) < 1e-3 and kl(target, found) < 1e-3  # 1.6e-4 at most


def test_without_the_kl_the_policy_collapses() -> None:
    """Onto the best response, whose probability under the reference is all that is left of it; p* has others."""
    problem = LAB["strict"]
    best = problem.rewards.argmax()
    found = lab(Posterior(PosteriorConfig(kl_coef=0.0, beta=1.0)), "strict")
    entropy = -(found.exp() * found).sum()
    assert found[best].exp() > 0.99 and entropy < 0.05
    assert kl(found, problem.log_ref) == pytest.approx(-problem.log_ref[best].item(), abs=0.05)
    kept = lab(Posterior(PosteriorConfig(kl_coef=1.0, beta=1.0)), "strict")
    assert -(kept.exp() * kept).sum() > 1.0
    assert Posterior(PosteriorConfig(kl_coef=0.0, beta=1.0)).needs().log_probs == set()


def test_no_sample_makes_up_a_step() -> None:
    rewards = torch.tensor([[0.0] * 7 + [900.0]], dtype=torch.float64)
    under: Mapping[str, Tensor] = dict.fromkeys(("policy", "reference"), torch.zeros(1, 8, 2, dtype=torch.float64))
    batch = AdvantageInputs(rewards, rewards[:, :0], under, torch.Generator())
    found = Posterior(PosteriorConfig(kl_coef=1.0, beta=0.0)).advantages(batch)
    assert found.advantages[0].tolist() == pytest.approx([-1.0] * 7 + [9.0])
    assert found.metrics["bond/truncated"] == 1 and found.metrics["bond/ess"] == pytest.approx(1 / 8)


# settings


@pytest.mark.parametrize(("make", "says"), [
    (lambda: PKPOConfig(k=0), "--bond.k must be at least 1"),
    (lambda: PKPOConfig(gamma_ref=-1.0), "--bond.gamma_ref must be at least 0"),
    (lambda: MaxRL.Config(gamma_ref=math.inf), "--bond.gamma_ref must be at least 0"),
    (lambda: PosteriorConfig(kl_coef=-1.0), "--bond.kl_coef must be at least 0"),
    (lambda: PosteriorConfig(kl_coef=0.0), "use --bond.beta 1"),
    (lambda: PosteriorConfig(beta=1.5), "--bond.beta must lie in"),
    (lambda: PosteriorConfig(max_weight=0.5), "--bond.max_weight must be at least 1"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_what_each_needs() -> None:
    assert PKPO(PKPOConfig(k=5)).needs().least == 5 and PKPO(PKPOConfig(k=1)).needs().least == 2
    assert PKPO(PKPOConfig()).needs().log_probs == set()
    assert MaxRL(MaxRL.Config(gamma_ref=0.1)).needs().log_probs == {"reference"}
    assert {cls.policy_loss for cls in (PKPO, MaxRL, Posterior)} == {"ppo"}


def test_the_laboratory_says_which_rewards_maxrl_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--steps", "2", "--prompts", "16", "--output-dir", str(tmp_path / "out")]
    assert main(["lab", "--algorithm", "maxrl", *few]) == 1
    assert "bond lab: error: maxrl: rewards must be 0 or 1" in capsys.readouterr().err

"""KDRL on a policy that can be enumerated: which objective its gradient is of, and where it comes to rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from enumerated import SIZE, difference_of_advantages, gradient, kl, moved, over_states, row_losses
from torch import Tensor

from bond_plugin.algorithms import AdvantageInputs, assemble
from bond_plugin.algorithms.kdrl import KDRL, KDRLConfig
from bond_plugin.lab.learner import TEACHER, Learner, Training, train
from bond_plugin.lab.problem import RESPONSES, Problem

STRICT, TIED = Problem.make("strict"), Problem.make("tied")


def build(beta: float, **settings: object) -> KDRL:
    return KDRL(KDRLConfig(kl_coef=beta, anneal_steps=0, **settings))


def expected_gradient(algorithm: KDRL, problem: Problem) -> Tensor:
    """Over all pairs of responses, by their probabilities under a policy; the teacher is another."""
    policy, teacher = moved(problem, 1), moved(problem, 2).token_log_probs().detach()
    pairs = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))
    tokens = policy.token_log_probs().detach()
    under = {"policy": tokens[pairs], "teacher": teacher[pairs]}
    inputs = AdvantageInputs(problem.rewards[pairs], problem.rewards[pairs][:, :0], under, torch.Generator())
    found = assemble.advantages(algorithm, inputs)
    chance = policy.log_probs().detach()[pairs].sum(dim=-1).exp()
    losses = row_losses(algorithm, policy, pairs, found.advantages, n=2)
    return gradient((chance * losses.sum(dim=-1)).sum(), policy)


def exact_gradient(problem: Problem, beta: float, level: str, counted: Tensor | None = None) -> Tensor:
    """Of -E[sign(r - r') / sqrt 2], r' another sample held fixed (two normalised rewards are +-1 / sqrt 2), and
    beta KL; of what is ``counted``, ``[S]``, beta k2.
    """
    policy, teacher = moved(problem, 1), moved(problem, 2)
    log_pi, log_teacher = policy.log_probs(), teacher.log_probs().detach()
    chance = log_pi.exp()
    wins = torch.sign(problem.rewards.unsqueeze(1) - problem.rewards) / 2**0.5
    reward = (chance * (wins @ chance.detach())).sum()
    if counted is not None:
        squares = (policy.token_log_probs() - teacher.token_log_probs().detach()).square().sum(dim=-1)
        distance = (chance.detach() * counted * squares).sum() / 2
    elif level == "token":
        distance = over_states(policy, log_pi, log_teacher, kl)
    else:
        distance = kl(log_pi, log_teacher)
    return gradient(beta * distance - reward, policy)


@pytest.mark.parametrize("problem", [STRICT, TIED], ids=["strict", "tied"])
def test_the_gradient_is_that_of_the_reward_and_the_kl_to_the_teacher(problem: Problem) -> None:
    """Per token it is that of the KLs of next tokens, with the states held fixed, and not that of KL(pi || pi_T)."""
    per_token, whole = (expected_gradient(build(0.8, level=level), problem) for level in ("token", "sequence"))
    torch.testing.assert_close(per_token, exact_gradient(problem, 0.8, "token"), rtol=0, atol=1e-9)
    torch.testing.assert_close(whole, exact_gradient(problem, 0.8, "sequence"), rtol=0, atol=1e-9)
    assert (per_token - whole).norm() > 0.1 * whole.norm()


def test_masks_leave_out_what_is_right() -> None:
    """By response: k2 of the wrong ones. By group: of a wrong one, if the other is wrong too."""
    wrong = 1 - TIED.rewards
    found = expected_gradient(build(0.8, mask="response"), TIED)
    torch.testing.assert_close(found, exact_gradient(TIED, 0.8, "token", wrong), rtol=0, atol=1e-9)
    found = expected_gradient(build(0.8, mask="group"), TIED)
    other = (moved(TIED, 1).log_probs().detach().exp() * wrong).sum()
    torch.testing.assert_close(found, exact_gradient(TIED, 0.8, "token", wrong * other), rtol=0, atol=1e-9)


def resting_place(beta: float, level: str, n: int) -> Tensor:
    """``[S]`` log pi at which the expected gradient is zero, by iteration. The teacher is the laboratory's.

    Of whole responses, pi = pi_T exp(d r / beta) / Z, d the difference of advantages at pi. Per token, each state's
    next tokens are the teacher's times exp(E[d r | the token] / beta).
    """
    # [prefixes, S]: where a response begins so. Of each prefix, the places of those that go on from the same state.
    prefixes = sorted({r[: t + 1] for r in RESPONSES for t in range(len(r))})
    begins = torch.tensor([[float(r[: len(p)] == p) for r in RESPONSES] for p in prefixes], dtype=torch.float64)
    beside = torch.tensor([[prefixes.index((*p[:-1], token)) for token in range(4)] for p in prefixes])
    teacher = TIED.best_of(TEACHER)
    mass = begins @ teacher.exp()
    taught = (mass / mass[beside].sum(dim=-1)).log()  # the teacher's next tokens
    log_pi = teacher
    for _ in range(200):
        chance = log_pi.exp()
        value = difference_of_advantages((chance @ TIED.rewards).item(), n) * TIED.rewards / beta
        if level == "sequence":
            wanted = (teacher + value).log_softmax(0)
        else:
            each = taught + (begins @ (chance * value)) / (begins @ chance)
            wanted = begins.T @ (each - each[beside].logsumexp(dim=-1))
        log_pi = (0.8 * log_pi + 0.2 * wanted).log_softmax(0)
    return log_pi


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_training_comes_to_rest_where_it_should(level: str) -> None:
    policy = TIED.policy()
    algorithm = build(1.0, level=level)
    train(TIED, algorithm, policy, 4, Training(steps=300, lr=0.1, prompts=512, seed=7))
    rest = resting_place(1.0, level, n=8)
    assert kl(policy.log_probs().detach(), rest) < 5e-4
    other = resting_place(1.0, {"token": "sequence", "sequence": "token"}[level], n=8)
    assert kl(rest, other) > 5e-3


def test_beta_falls_linearly_with_the_steps_of_the_run() -> None:
    config = KDRLConfig(kl_coef=0.5, kl_coef_end=0.1, anneal_steps=4)

    def beta(config: KDRLConfig, step: int) -> float:
        under = dict.fromkeys(("policy", "teacher"), torch.zeros(1, 2, 1))
        inputs = AdvantageInputs(torch.zeros(1, 2), torch.zeros(1, 0), under, torch.Generator(), step=step)
        return KDRL(config).advantages(inputs).metrics["bond/kl_coef"]

    assert [round(beta(config, step), 9) for step in (0, 1, 2, 4, 9)] == [0.5, 0.4, 0.3, 0.1, 0.1]
    assert beta(replace(config, anneal_steps=0), 100) == 0.5
    learner, seen = Learner(TIED, KDRL(config), TIED.policy(), Training(prompts=2)), []
    original = learner.method.advantages

    def record(batch: object) -> object:
        out = original(batch)
        seen.append(out.metrics["bond/kl_coef"])
        return out

    learner.method.advantages = record
    for _ in range(3):
        learner.losses()
    assert seen == pytest.approx([0.5, 0.4, 0.3])


@pytest.mark.parametrize(("settings", "says"), [
    ({"kl_coef": -1.0}, "--bond.kl_coef must be at least 0"),
    ({"kl_coef_end": float("nan")}, "--bond.kl_coef_end must be at least 0"),
    ({"anneal_steps": -1}, "--bond.anneal_steps must be at least 0"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        KDRLConfig(**settings)

"""``bond lab``: what it computes exactly, what each method reaches beside it, and its command line.

The thresholds hold for every seed that was tried; next to each claim stands what was reached.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import clean_environment
from torch import Tensor

from bond_plugin import registry
from bond_plugin.algorithms import AdvantageOutputs, Algorithm
from bond_plugin.algorithms.assemble import ContractError
from bond_plugin.cli.main import main
from bond_plugin.lab import plots, programme
from bond_plugin.lab.estimators import (
    draw_gradients,
    exact_gradient,
    gradient_error,
    halfway,
    jbond_objective,
    jeffreys_objective,
)
from bond_plugin.lab.learner import Learner, Run, Training, train
from bond_plugin.lab.methods import CACHE, VBoNByN, build, harmonic_log_quantile
from bond_plugin.lab.problem import RESPONSES, VOCABULARY, Problem

N = 4
STRICT, TIED = Problem.make("strict"), Problem.make("tied")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kl(log_p: Tensor, log_q: Tensor) -> float:
    return (log_p.exp() * (log_p - log_q)).sum().item()


def trained(method: Any, problem: Problem = STRICT, kind: str = "full", **training: Any) -> tuple[Run, Tensor]:
    """The way, and log pi at its end."""
    policy = problem.policy(kind)
    found = train(problem, method, policy, N, replace(programme.training_of(method, seed=7), **training))
    return found, policy.log_probs().detach()


def run(method: Any, problem: Problem = STRICT, kind: str = "full", **training: Any) -> Run:
    return trained(method, problem, kind, **training)[0]


def bond(**settings: Any) -> Any:
    return build("bond", **{"n": N, "beta": 1.0, **settings})


def vbon(bound: str) -> Any:
    return build("vbon", n=N, bound=bound)


# What is exact.


@pytest.mark.parametrize("problem", [STRICT, TIED], ids=["strict", "tied"])
def test_best_of_n_is_what_drawing_n_and_keeping_the_best_gives(problem: Problem) -> None:
    """By all triples, ties at random."""
    mass = problem.log_ref.exp()
    r = problem.rewards
    best = torch.maximum(torch.maximum(r[:, None, None], r[None, :, None]), r[None, None, :])
    triples = mass[:, None, None] * mass[None, :, None] * mass[None, None, :]
    first = (r[:, None, None] == best).double()
    winners = first + (r[None, :, None] == best).double() + (r[None, None, :] == best).double()
    by_hand = 3 * (triples * first / winners).sum(dim=(1, 2))  # the three places are alike
    torch.testing.assert_close(problem.best_of(3).exp(), by_hand, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(problem.best_of(3 + 1e-9).exp(), by_hand, rtol=1e-6, atol=1e-12)


def test_measurements_by_hand() -> None:
    policy = halfway(STRICT, N).log_probs().detach()
    point, target = STRICT.measure(policy, N), STRICT.best_of(N)
    assert point.kl_to_bon == pytest.approx(kl(policy, target))
    assert point.kl_from_bon == pytest.approx(kl(target, policy))
    assert point.jeffreys == pytest.approx((kl(policy, target) + kl(target, policy)) / 2)
    assert point.kl_ref == pytest.approx(kl(policy, STRICT.log_ref))
    assert point.reward == pytest.approx((policy.exp() @ STRICT.rewards).item())
    order = STRICT.rewards.argsort()
    below = STRICT.log_ref.exp()[order].cumsum(0) - STRICT.log_ref.exp()[order]
    middle = below + STRICT.log_ref.exp()[order] / 2
    assert point.quantile == pytest.approx((policy.exp()[order] @ middle).item())
    assert STRICT.measure(STRICT.log_ref, N).quantile == pytest.approx(0.5)
    worth, gap = STRICT.worth(STRICT.measure(STRICT.best_of(5), N))
    assert (worth, gap) == (pytest.approx(5), pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("kind", ["full", "restricted"])
def test_token_log_probabilities_are_conditional_and_add_up(kind: str) -> None:
    policy = STRICT.policy(kind)
    torch.testing.assert_close(policy.log_probs(), STRICT.log_ref)
    with torch.no_grad():
        policy.parameters.copy_(torch.linspace(-2, 1, len(policy.parameters), dtype=torch.float64))
    tokens = policy.token_log_probs()
    torch.testing.assert_close(tokens.sum(-1), policy.log_probs())
    assert policy.log_probs().exp().sum().item() == pytest.approx(1.0)
    # After each prefix that goes on, the next tokens are a distribution.
    following: dict[tuple[int, ...], dict[int, float]] = {}
    for i, response in enumerate(RESPONSES):
        for t, token in enumerate(response):
            following.setdefault(response[:t], {})[token] = tokens[i, t].exp().item()
    assert len(following) == 13
    for by_token in following.values():
        assert len(by_token) == VOCABULARY
        assert sum(by_token.values()) == pytest.approx(1.0)


def test_the_tied_problem_is_a_verifier() -> None:
    assert sorted(set(TIED.rewards.tolist())) == [0.0, 1.0]
    assert (TIED.log_ref.exp() @ TIED.rewards).item() == pytest.approx(0.25, abs=0.03)
    assert len(set(STRICT.rewards.tolist())) == len(RESPONSES)


def test_anchors_move_as_asked() -> None:
    average = Learner(STRICT, build("jbond", eta=0.25), STRICT.policy(), Training())
    periodic = Learner(STRICT, bond(n=2, anchor="periodic", anchor_interval=3), STRICT.policy(), Training())
    for learner in (average, periodic):
        with torch.no_grad():
            learner.policy.parameters += 1.0
    for step in (1, 2):
        assert not average.move_anchor(step)
        assert not periodic.move_anchor(step)
    assert average.anchor[0].item() == pytest.approx(1 - 0.75**2)
    assert periodic.anchor[0].item() == 0.0
    assert periodic.move_anchor(3)
    assert periodic.anchor[0].item() == 1.0


def test_the_loss_gets_what_training_gives_it() -> None:
    learner = Learner(STRICT, bond(beta=0.5), STRICT.policy(), Training(prompts=3, samples=2))
    seen: list[Any] = []
    original = learner.policy_loss

    def record(inputs: Any) -> Any:
        seen.append(inputs)
        return original(inputs)

    learner.policy_loss = record
    learner.losses()
    (inputs,) = seen
    assert inputs.from_source.tolist() == [False, False, True] * 3
    assert inputs.on_policy
    assert inputs.log_probs.requires_grad
    assert not inputs.old_log_probs.requires_grad
    torch.testing.assert_close(inputs.log_probs, inputs.old_log_probs)
    assert (inputs.advantages[inputs.mask == 0] == 0).all()
    assert (inputs.advantages[inputs.from_source] == 0.5 * inputs.mask[inputs.from_source]).all()


def test_cached_rewards_are_drawn_once_a_run_and_anew_for_each_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    original = Learner.draw_cache

    def count(self: Learner) -> None:
        original(self)
        drawn.append(self.cache)

    monkeypatch.setattr(Learner, "draw_cache", count)
    run(vbon("l1"), steps=3, prompts=2, cached=5)
    assert [cache.shape for cache in drawn] == [(2, 5)]
    run(bond(), steps=3, prompts=2)
    assert len(drawn) == 1
    draw_gradients(STRICT, vbon("l1"), STRICT.policy(), Training(prompts=2), 4)
    assert len(drawn) == 1 + 5
    assert not torch.equal(drawn[-1], drawn[-2])


def test_the_harmonic_quantile_is_the_mean_over_the_orders_of_equals() -> None:
    """H_c - H_k, by hand; and its expectation is -sum_{j<=k} E[(1 - F)^j] / j, by enumeration of k = 3 samples."""
    samples = torch.tensor([[3.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    placed = torch.tensor([[0.0, 1.0, 1.5, 2.0, 9.0]], dtype=torch.float64)
    h = [0.0, 1.0, 1.5, 11 / 6, 25 / 12]
    wanted = [h[0], (h[0] + h[1] + h[2]) / 3, h[2], (h[2] + h[3]) / 2, h[4]]
    found = harmonic_log_quantile(placed, samples)[0]
    assert found.tolist() == pytest.approx([value - h[4] for value in wanted], abs=1e-14)
    k = 3
    index = torch.cartesian_prod(*[torch.arange(40)] * k)
    weight = STRICT.log_ref.exp()[index].prod(dim=-1)
    for problem in (STRICT, TIED):
        low, high = (each[:5] for each in problem.levels())
        powers = [((1 - low) ** (j + 1) - (1 - high) ** (j + 1)) / (j + 1) / (high - low) for j in range(1, k + 1)]
        rewards = problem.rewards[:5].repeat(len(index), 1)
        mean = weight @ harmonic_log_quantile(rewards, problem.rewards[index])
        torch.testing.assert_close(mean, -sum(power / j for j, power in enumerate(powers, start=1)))


# What each method reaches.


@pytest.mark.parametrize(
    "method",
    [vbon("exact"), vbon("tied"), bond(), bond(n_anchor_samples=64), bond(reward_cache=CACHE), bond(beta=0.5)],
    ids=["vbon exact", "vbon tied", "bond k 16", "bond k 64", "bond cached", "bond beta 0.5"],
)
def test_reaches_best_of_n(method: Any) -> None:
    """From 1.54 and 0.63 nats to 0.002."""
    end = run(method).end
    assert end.kl_to_bon < 0.004
    assert end.kl_from_bon < 0.004


@pytest.mark.parametrize("method", [bond(beta=0.0), build("bon_sft", n=N)], ids=["bond beta 0", "bon_sft"])
def test_forward_alone_reaches_best_of_n_where_it_can_be_matched(method: Any) -> None:
    assert run(method).end.kl_to_bon < 0.006


def test_scaled_by_one_over_n_the_optimum_is_another_distribution() -> None:
    """It is pi_ref (pi_BoN / pi_ref)^((N-1)/N), and the policy gets there."""
    config = vbon("exact").config
    found, log_probs = trained(VBoNByN(config))
    target, log_ref = STRICT.best_of(N), STRICT.log_ref
    tempered = (log_ref + (target - log_ref) * (N - 1) / N).log_softmax(-1)
    assert kl(log_probs, tempered) < 0.004
    assert found.end.kl_to_bon > 0.015  # 0.022
    assert found.end.reward < STRICT.measure(target, N).reward - 0.2


@pytest.mark.parametrize("quantile", ["monte_carlo", "learned"])
def test_without_term_b_the_target_is_the_power_of_the_quantile(quantile: str) -> None:
    """pi_ref p_<=^(N-1): 0.02 nats from Best-of-N, as some responses have much mass. The classifier learns p_<=."""
    found, log_probs = trained(bond(correction=False, quantile=quantile))
    _, p_le = STRICT.levels()
    target = (STRICT.log_ref + (N - 1) * p_le.log()).log_softmax(-1)
    assert kl(log_probs, target) < 0.01
    assert found.end.kl_to_bon > 0.01


def test_l1_is_a_bound_and_not_tight_here() -> None:
    end = run(vbon("l1")).end
    assert 0.015 < end.kl_to_bon < 0.06  # 0.033
    assert end.kl_ref > STRICT.measure(STRICT.best_of(N), N).kl_ref + 0.05


def test_iterated_n_2_follows_best_of_powers_of_2() -> None:
    method = bond(n=2, beta=0.5, n_anchor_samples=32, anchor="periodic", anchor_interval=60)
    found, log_probs = trained(method, steps=240)
    assert len(found.rounds) == 4
    for m, point in enumerate(found.rounds, start=1):
        exact = STRICT.measure(STRICT.best_of(2**m), N)
        worth, gap = STRICT.worth(point)
        assert abs(gap) < 0.06  # on the curve: of a reward that rises by 5
        assert math.log2(worth) == pytest.approx(m, abs=0.2)  # and at its place
        assert point.reward == pytest.approx(exact.reward, abs=0.12)
    assert kl(log_probs, STRICT.best_of(16)) < 0.03


@pytest.mark.parametrize(
    "method",
    [
        build("jbond", eta=0.01),
        build("jbond", eta=0.01, n_anchor_samples=2),
        bond(n=2, beta=0.5, anchor="ema", eta=0.01),
    ],
    ids=["jbond", "jbond, Algorithm 2", "bond ema"],
)
def test_a_moving_average_passes_best_of_n_and_goes_on(method: Any) -> None:
    """An anchor in logits that follows Best-of-2 of itself makes the policy Best-of-2 e^(eta t), less its lag."""
    found = run(method, steps=200)
    assert found.closest.kl_to_bon < 0.035
    assert 60 <= found.closest.step <= 110  # log 2 / 0.01 = 69
    worth, gap = STRICT.worth(found.end)
    assert 9 < worth < 2 * math.exp(0.01 * 200) * 1.1
    assert abs(gap) < 0.12


def test_jeffreys_lowers_both_directions_where_each_alone_raises_the_other() -> None:
    start = STRICT.measure(STRICT.log_ref, N)
    forward, jeffreys, backward = (
        run(bond(beta=beta, n_anchor_samples=64), kind="restricted", prompts=64, steps=120).end
        for beta in (0.0, 0.5, 1.0)
    )
    margin = 0.05
    assert forward.kl_from_bon < start.kl_from_bon - margin
    assert forward.kl_to_bon > start.kl_to_bon + margin
    assert backward.kl_to_bon < start.kl_to_bon - margin
    assert backward.kl_from_bon > start.kl_from_bon + margin
    assert jeffreys.kl_from_bon < start.kl_from_bon - margin
    assert jeffreys.kl_to_bon < start.kl_to_bon - margin
    for beta, found in ((0.0, forward), (0.5, jeffreys), (1.0, backward)):
        policy = STRICT.policy("restricted")
        objective = jeffreys_objective(STRICT, N, beta)
        optimiser = torch.optim.LBFGS([policy.parameters], max_iter=100, line_search_fn="strong_wolfe")

        def closure(policy: Any = policy, objective: Any = objective, optimiser: Any = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = objective(policy.log_probs())
            value.backward()
            return value

        optimiser.step(closure)
        least = objective(policy.log_probs()).item()
        reached = (1 - beta) * found.kl_from_bon + beta * found.kl_to_bon
        assert least <= reached + 1e-9
        assert reached == pytest.approx(least, abs=0.01)


def test_ties_need_term_b_and_the_tied_reward() -> None:
    assert run(bond(), TIED, steps=100).end.kl_to_bon < 0.004
    assert run(vbon("tied"), TIED, steps=100).end.kl_to_bon < 0.001
    assert run(bond(correction=False), TIED, steps=60).end.kl_to_bon > 0.08  # 0.13
    for bound in ("exact", "l1"):  # each collapses on the right responses
        end = run(vbon(bound), TIED, steps=60).end
        assert end.kl_to_bon > 0.2
        assert end.reward > 0.98
    expected, textbook = (
        run(build("jbond", eta=0.01, n_anchor_samples=2, ties=ties), TIED, steps=160).closest
        for ties in ("expected", "textbook")
    )
    assert expected.kl_to_bon < 0.02
    assert textbook.step > 1.5 * expected.step  # 150 against 60: seldom a signal


# Estimators.


def errors(method: Any, objective: Callable[[Tensor], Tensor], batches: int = 120, **training: Any) -> Any:
    policy = halfway(STRICT, N)
    settings = replace(Training(prompts=128, samples=8, seed=3), **training)
    gradients = draw_gradients(STRICT, method, policy, settings, batches)
    return gradient_error(gradients, exact_gradient(policy, objective))


def test_gradient_error_finds_a_bias_and_its_size() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.full((40,), 1.0, dtype=torch.float64)
    noise = 2 * torch.randn(200, 40, generator=generator, dtype=torch.float64)
    fair = gradient_error(noise + exact, exact)
    assert not fair.biased
    assert fair.noise == pytest.approx(2.0, rel=0.1)
    assert fair.resolution == pytest.approx(2 / math.sqrt(200), rel=0.1)
    off = gradient_error(noise + 1.3 * exact, exact)
    assert off.biased
    assert off.bias == pytest.approx(0.3, abs=0.03)
    assert off.cosine == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        (bond(beta=0.0), jeffreys_objective(STRICT, N, 0.0)),
        (build("bon_sft", n=N), jeffreys_objective(STRICT, N, 0.0)),
        (build("jbond", n_anchor_samples=2), jbond_objective(STRICT, 0.5)),
        (build("jbond", n_anchor_samples=2, beta=1.0), jbond_objective(STRICT, 1.0)),
    ],
    ids=["bond beta 0", "bon_sft", "jbond", "jbond beta 1"],
)
def test_forward_and_jbond_gradients_are_unbiased(method: Any, objective: Callable[[Tensor], Tensor]) -> None:
    found = errors(method, objective)
    assert abs(found.z) < 4
    assert found.bias < 2 * found.resolution < 0.3


def test_the_pooled_form_has_less_noise_than_algorithm_2_at_as_many_responses() -> None:
    """Eight of the policy, beside six of the policy and two of the anchor."""

    def noise(samples: int, **settings: Any) -> float:
        method = build("jbond", **settings)
        training = Training(prompts=64, samples=samples)
        gradients = draw_gradients(STRICT, method, halfway(STRICT, 2), training)
        objective = jeffreys_objective(STRICT, 2, 0.5)
        return gradient_error(gradients, exact_gradient(halfway(STRICT, 2), objective)).noise

    assert noise(8) < 0.5 * noise(6, n_anchor_samples=2)


def test_the_log_of_a_monte_carlo_quantile_is_biased_and_less_so_for_larger_k() -> None:
    few, many = (errors(bond(n_anchor_samples=k), jeffreys_objective(STRICT, N, 1.0), 60) for k in (16, 128))
    assert few.biased
    assert 0.04 < few.bias < 0.15  # 8 %
    assert many.bias < 0.03  # 1 %


def test_vbons_gradient_is_that_of_the_backward_kl_by_its_coefficient() -> None:
    objective = jeffreys_objective(STRICT, N, 1.0, 1 / (N - 1))
    small, large = (errors(vbon("exact"), objective, 60, prompts=64, samples=16, cached=m) for m in (16, 300))
    assert 0.1 < small.bias < 0.3
    assert large.bias < 0.04
    assert errors(VBoNByN(vbon("exact").config), objective, 60, prompts=64, samples=16).bias > 0.3


def test_jbonds_crude_reward_is_not_the_log_quantile() -> None:
    found = errors(build("jbond", n_anchor_samples=2), jeffreys_objective(STRICT, 2, 0.5))
    assert found.biased
    assert found.bias > 0.15
    assert found.cosine > 0.95


# The command.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole programme, with hardly any training."""
    original = programme.training_of
    monkeypatch.setattr(programme, "_PERIOD", 2)
    monkeypatch.setattr(
        programme,
        "training_of",
        lambda method, seed, steps=0: replace(original(method, seed), steps=min(steps, 8), prompts=32),
    )
    monkeypatch.setattr(programme, "draw_gradients", functools.partial(draw_gradients, batches=3))


def test_without_flags_everything_is_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shortened(monkeypatch)
    assert main(["lab"]) == 0
    out = capsys.readouterr().out
    for words in ("any distribution", "two parameters", "Rewards 0 and 1", "Best-of-16", "gradient of", "jbond"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 118
    found = json.loads((folder / "lab" / "lab.json").read_text())
    assert set(found["tables"]) == {"full", "restricted", "tied"}
    assert [r["n"] for r in found["rounds"]] == [2, 4, 8, 16]
    assert len(found["estimators"]) == 17
    row = found["tables"]["full"]["rows"][2]
    assert row["point"]["jeffreys"] == pytest.approx((row["point"]["kl_to_bon"] + row["point"]["kl_from_bon"]) / 2)
    assert len(row["trajectory"]) == 3
    assert (folder / "lab" / "lab.png").read_bytes().startswith(b"\x89PNG")
    assert main(["lab", "--algorithm", "jbond", "--seed", "1", *SHORT]) == 0  # its own files are replaced
    assert json.loads((folder / "lab" / "lab.json").read_text())["seed"] == 1


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few batches for the estimators, and no picture."""
    monkeypatch.setattr(programme, "draw_gradients", functools.partial(draw_gradients, batches=3))
    monkeypatch.setattr(plots, "draw", lambda report: b"")


SHORT = ["--steps", "6", "--prompts", "16", "--samples", "4"]


def test_one_algorithm_is_deterministic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    argv = ["lab", "--algorithm", "bond", "--bond.n", "2", "--bond.anchor=periodic", "--bond.anchor_interval", "3",
            "--no-bond.correction", *SHORT]  # fmt: skip
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*argv, "--output-dir", name, "--seed", seed]) == 0
    read = {name: (folder / name / "lab.json").read_bytes() for name in "abc"}
    assert read["a"] == read["b"]
    assert json.loads(read["a"])["tables"] != json.loads(read["c"])["tables"]
    assert [r["n"] for r in json.loads(read["a"])["rounds"]] == [2, 4]


def test_a_reward_transform_takes_its_own_flags(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    argv = ["lab", "--algorithm", "vbon", "--vbon.n", "3", "--vbon.bound", "exact", "--cached", "20", *SHORT]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "vbon, against Best-of-3" in out
    assert "vbon, N 3" in out


def test_as_many_samples_are_drawn_for_the_estimators_as_the_method_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best-of-8 from the policy's own samples takes eight."""
    quick(monkeypatch)
    argv = ["lab", "--algorithm", "bond", "--bond.n", "8", "--bond.n_anchor_samples", "0", *SHORT[:4]]
    assert main(argv) == 0
    assert "bond, N 8" in capsys.readouterr().out


ERRORS = [
    (["--steps", "3"], "--steps needs --algorithm NAME"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--algorithm", "jbonb"], "did you mean 'jbond'?"),
    (["--algorithm", "bond", "--n", "1"], "--n must be at least 2"),
    (["--algorithm", "bond", "--lr", "nan"], "--lr must be above 0"),
    (["--algorithm", "bond", "--bond.n", "1"], "--bond.n must be at least 2"),
    (["--algorithm", "bond", "--bond.betta", "1"], "did you mean '--bond.beta'?"),
    (["--algorithm", "bond", "--no-bond.kl_ref"], "--no-bond.kl_ref is about the host"),
    (["--algorithm", "bond", "--bond.quantile", "learned"], "add --no-bond.correction"),
    (["--algorithm", "bond", "--bond.reward_cache", "rewards.jsonl"], "choose from 'lab'"),
    (["--algorithm", "bond", "--bond.baseline", "leave_one_out", "--samples", "1"], "raise --samples"),
    (["--algorithm", "bond", "--prompts", "1", "--samples", "1"], "--prompts x --samples"),
    (["--algorithm", "jbond", "--vbon.n", "3"], "--vbon.n belongs to --algorithm vbon"),
    (["--bond.beta", "1"], "add --algorithm NAME"),
    (["--algorithm", "bond", "--reward", "none"], "invalid choice: 'none'"),
    (["surplus"], "unexpected argument 'surplus'"),
    (["--output-dir", "file"], "--output-dir file: a file is where the folder should be"),
    (["--output-dir", "file/in"], "--output-dir file: a file is where the folder should be"),
    (["--output-dir", "taken"], "has a lab.json that `bond lab` did not write"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "says"), ERRORS, ids=lambda value: value if isinstance(value, str) else None)
def test_errors_before_anything_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("training was started")

    monkeypatch.setattr(programme, "train", nothing)
    monkeypatch.setattr(programme, "draw_gradients", nothing)
    (folder / "file").write_text("")
    (folder / "taken").mkdir()
    (folder / "taken" / "lab.json").write_text('{"mine": 1}')
    try:
        status = main(["lab", *argv])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert says in capsys.readouterr().err
    assert (folder / "taken" / "lab.json").read_text() == '{"mine": 1}'
    assert sorted(path.name for path in folder.iterdir()) == ["file", "taken"]


THIRD_PARTY = '''
from dataclasses import dataclass

import torch
from bond_plugin.algorithms import (
    AdvantageOutputs, Algorithm, Config, RewardTransform, TransformConfig, TransformOutputs, flag
)


@dataclass(frozen=True)
class PlainConfig(Config):
    weight: float = flag(1.0, "of the reward")


class Plain(Algorithm):
    """REINFORCE with the host's own loss and nothing else."""

    Config = PlainConfig

    def advantages(self, batch):
        centred = batch.rewards - batch.rewards.mean()
        return AdvantageOutputs(self.config.weight * centred, metrics={"mine": 1.0})


class Crooked(Algorithm):
    def advantages(self, batch):
        return AdvantageOutputs(batch.rewards[:, 0])


class Doubled(RewardTransform):
    """Its coefficient is 2; it wants no cache."""

    kl_coefficient = 2.0

    def transform(self, batch):
        return TransformOutputs(2 * batch.rewards)
'''


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution with two algorithms and a transform."""
    site = tmp_path / "site"
    metadata = site / "third_party-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "third_party.py").write_text(THIRD_PARTY)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[openrlhf.advantage_estimators]\nplain = third_party:Plain\ncrooked = third_party:Crooked\n"
        "[openrlhf.reward_transforms]\ndoubled = third_party:Doubled\n"
    )
    monkeypatch.syspath_prepend(str(site))
    registry.names.cache_clear()
    yield
    registry.names.cache_clear()
    sys.modules.pop("third_party", None)


@pytest.mark.usefixtures("third_party")
def test_an_algorithm_of_another_package_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    argv = ["lab", "--algorithm", "plain", "--bond.weight", "2", "--steps", "60", "--prompts", "64"]
    assert main(argv) == 0
    assert "plain, against Best-of-4" in capsys.readouterr().out
    rows = json.loads((folder / "lab" / "lab.json").read_text())["tables"]["one"]["rows"]
    assert rows[2]["point"]["reward"] > rows[1]["point"]["reward"]  # it collapses on the best response
    with pytest.raises(SystemExit):
        main(["lab", "--algorithm", "plain", "--help"])
    assert "--bond.weight" in capsys.readouterr().out


@pytest.mark.usefixtures("third_party")
def test_a_transform_of_another_package_by_name() -> None:
    """The reward 2 r with the coefficient 2: the optimum is pi_ref exp(r)."""
    _, log_probs = trained(build("doubled"), TIED)
    assert kl(log_probs, (TIED.log_ref + TIED.rewards).log_softmax(-1)) < 1e-3


def test_a_loss_of_the_algorithms_own_need_not_be_linear_in_log_pi() -> None:
    """Regression of the log-ratio to the reward: the optimum is pi_ref exp(r)."""
    _, log_probs = trained(build("squared:Squared"), TIED)
    assert kl(log_probs, (TIED.log_ref + TIED.rewards).log_softmax(-1)) < 1e-3


def test_stored_responses_alone_and_beside_the_policys() -> None:
    """The same optimum from the initial policy's samples alone; and Best-of-3, by imitation of the best of three."""
    _, log_probs = trained(build("squared:Offline"), TIED)
    assert kl(log_probs, (TIED.log_ref + TIED.rewards).log_softmax(-1)) < 1e-2
    _, log_probs = trained(build("squared:Beside"), TIED)
    assert kl(TIED.best_of(3), log_probs) < 1e-2


@pytest.mark.usefixtures("third_party")
def test_a_broken_contract_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "--algorithm", "crooked"]) == 1
    assert "crooked: advantages must be a tensor of shape (256, 8), got (256,)" in capsys.readouterr().err
    assert not (folder / "lab").exists()


def test_values_that_are_not_finite_are_named() -> None:
    class Infinite(Algorithm):
        def advantages(self, batch: Any) -> AdvantageOutputs:
            return AdvantageOutputs(batch.rewards.log())

    with pytest.raises(ContractError, match="advantages must be finite"):
        run(Infinite(Algorithm.Config()), TIED)


def test_the_laboratory_needs_no_host() -> None:
    probe = (
        "import sys; from bond_plugin.cli import lab; from bond_plugin.lab.learner import Learner, Training;"
        "from bond_plugin.lab.methods import build; from bond_plugin.lab.problem import Problem;"
        "lab.build_parser(); Learner(Problem.make(), build('jbond'), Problem.make().policy(),"
        " Training(prompts=4)).losses();"
        "loaded = [name for name in sys.modules if name.split('.')[0] in ('openrlhf', 'ray', 'vllm', 'deepspeed')"
        " or name.startswith('bond_plugin.host')]; assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", probe], env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_teaches_without_torch() -> None:
    probe = (
        "import sys; from bond_plugin.cli import lab; print(lab.build_parser().format_help());"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", probe], env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("KL(pi||BoN)", "restricted", "--algorithm", "test-bed", "bond lab --algorithm jbond"):
        assert words in done.stdout


def test_more_cached_rewards_bring_vbon_closer_and_l1_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimum for each cache is a formula; with a very large cache it is Best-of-N for the exact forms."""
    monkeypatch.setattr(programme, "_SIZES", (8, 64, 100_000))
    monkeypatch.setattr(programme, "_CACHES", 50)
    found = {(c.bound, c.samples): c for c in programme.sensitivity(STRICT, 0)}
    for bound in ("exact", "tied"):
        few, some, many = (found[bound, size].kl_to_bon for size in (8, 64, 100_000))
        assert few > 2 * some > 10 * many
        assert many < 1e-3
    assert found["l1", 100_000].kl_to_bon > 0.01

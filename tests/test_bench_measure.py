"""What `bond bench` measures of a policy, against exact values on responses of one token."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Tiny, moved_model
from enumerated import bon_log_probs

from bond_plugin.bench.measure import _plain, numbers
from bond_plugin.bestofn.distribution import level_probabilities
from bond_plugin.host.rewards import RewardError
from bond_plugin.offline import measure, scoring
from bond_plugin.offline.engine import PromptSamples
from bond_plugin.offline.measure import Scored, TokenizerError

PROMPTS = [[5, 6, 7], [10], [20, 21]]
VOCABULARY = 32
N = 4
COUNT = 4000  # samples a prompt
Q = 2000  # of them for quantiles


@pytest.fixture(scope="module")
def moved(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy some way off from the reference."""
    return moved_model(tiny.model, tmp_path_factory.mktemp("moved") / "model", 3, 0.08)


def log_probs(path: Path) -> torch.Tensor:
    """[prompts, vocabulary] float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1].double() for ids in PROMPTS]
    return torch.log_softmax(torch.stack(logits), dim=-1)


def samples_of(tokens: list[list[int]], prompts: list[list[int]] = PROMPTS) -> list[PromptSamples]:
    """Responses of one token, ``tokens`` [P][K]."""
    return [
        PromptSamples(ids, [[t] for t in row], [f"p{t}" for t in row], [])
        for ids, row in zip(prompts, tokens, strict=True)
    ]


def draw(logs: torch.Tensor, values: torch.Tensor, seed: int) -> Scored:
    tokens = torch.multinomial(logs.exp(), COUNT, replacement=True, generator=torch.Generator().manual_seed(seed))
    return Scored(samples_of(tokens.tolist()), values.gather(-1, tokens))


def job_for(model: Path | None, tiny: Tiny, settings: dict[str, Any]) -> SimpleNamespace:
    """Without a model, of the reference."""
    own = {"actor": {"model_name_or_path": str(tiny.model)}, "rollout": {"max_new_tokens": 1, "temperature": 1.0}}
    return SimpleNamespace(model=model and str(model), configuration=own, evaluation=settings)


@pytest.fixture(scope="module", params=["strict", "tied"])
def case(request: pytest.FixtureRequest, tiny: Tiny, moved: Path) -> SimpleNamespace:
    values = torch.rand(len(PROMPTS), VOCABULARY, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    if request.param == "tied":
        values = (values > 0.6).double()
    reference, policy = log_probs(tiny.model), log_probs(moved)
    kept = draw(reference, values, 1)
    settings = {
        "samples": COUNT, "quantile_samples": Q, "bon_levels": [N], "forward_samples": 400, "examples": 2,
    }  # fmt: skip
    job = job_for(moved, tiny, settings)
    found = numbers(job, draw(policy, values, 2), kept)
    return SimpleNamespace(found=found, values=values, reference=reference, policy=policy, job=job, kept=kept)


def close(found: list[float], expected: torch.Tensor, tolerance: float) -> None:
    assert found == pytest.approx(expected.tolist(), abs=tolerance)


def test_kl_and_entropy_are_exact_for_one_token(case: SimpleNamespace) -> None:
    kl = (case.policy.exp() * (case.policy - case.reference)).sum(-1)
    assert kl.min() > 0.1
    close(case.found["kl"], kl, 1e-3)
    close(case.found["entropy"], -(case.policy.exp() * case.policy).sum(-1), 1e-3)


def test_reward_win_rate_and_quantiles(case: SimpleNamespace) -> None:
    mass = case.policy.exp()
    p_lt, p_le = level_probabilities(case.reference.exp(), case.values)
    close(case.found["reward"], (mass * case.values).sum(-1), 0.03)
    close(case.found["win_rate"], (mass * (p_lt + p_le) / 2).sum(-1), 0.03)
    close(case.found["quantile"], (mass * (p_lt + p_le) / 2).sum(-1), 0.03)
    close(case.found["log_quantile"], (mass * p_le.log()).sum(-1), 0.06)


def test_both_kls_to_best_of_n(case: SimpleNamespace) -> None:
    best = bon_log_probs(case.reference, case.values, N)
    mass = case.policy.exp()
    backward = (mass * (case.policy - best)).sum(-1)
    forward = (best.exp() * (best - case.policy)).sum(-1)
    assert backward.min() > 0.1
    assert forward.min() > 0.1
    close(case.found["backward_kl"][str(N)], backward, 0.2)  # the log of small quantiles, times N - 1
    close(case.found["forward_kl"][str(N)], forward, 0.12)


def test_zero_one_rewards_have_pass_at_k(case: SimpleNamespace) -> None:
    if "pass_at" not in case.found:
        assert case.values.unique().numel() > 2
        return
    right = (case.policy.exp() * case.values).sum(-1)
    for k, found in case.found["pass_at"].items():
        close(found, 1 - (1 - right) ** int(k), 0.06)


def test_the_reference_is_at_its_own_place(case: SimpleNamespace, tiny: Tiny) -> None:
    job = job_for(None, tiny, {**case.job.evaluation, "samples": 1000})
    found = numbers(job, case.kept, case.kept)
    assert found["kl"] == [0.0] * len(PROMPTS)
    close(found["win_rate"], torch.full((len(PROMPTS),), 0.5), 0.05)
    best = bon_log_probs(case.reference, case.values, N)
    close(found["backward_kl"][str(N)], (case.reference.exp() * (case.reference - best)).sum(-1), 0.15)
    close(found["forward_kl"][str(N)], (best.exp() * (best - case.reference)).sum(-1), 0.12)


def test_another_tokenizer_is_refused(case: SimpleNamespace) -> None:
    drawn = Scored(samples_of([[5]] * 3, [[1], [2], [3]]), torch.zeros(3, 1))
    with pytest.raises(TokenizerError, match="tokenize the prompts differently"):
        numbers(case.job, drawn, case.kept)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_an_error_that_names_the_prompt(value: float) -> None:
    def score(prompt: str, label: Any, samples: PromptSamples) -> list[float]:
        return [value if prompt == "second" else 0.5]

    with pytest.raises(RewardError, match="'second'"):
        scoring.rewards(score, [("p", ""), ("second", ""), ("p", "")], samples_of([[5]] * 3))


def test_best_of_reference_takes_disjoint_groups_after_those_of_the_quantiles() -> None:
    rewards = torch.arange(40.0).reshape(2, 20)
    rewards[1] = -rewards[1]
    found = measure.best_of_reference(rewards, skip=4, levels=[2, 4], samples=4)
    assert found[2].tolist() == [[5, 7, 9, 11], [4, 6, 8, 10]]
    assert found[4].tolist() == [[7, 11, 15, 19], [4, 8, 12, 16]]


def test_distinct_n() -> None:
    assert measure.distinct([[[1, 2, 1, 2]]], 1) == pytest.approx(2 / 4)
    assert measure.distinct([[[1, 2, 1, 2]]], 2) == pytest.approx(2 / 3)
    assert measure.distinct([[[1], [1]], [[1], [2]]], 1) == pytest.approx((1 / 2 + 1) / 2)
    assert measure.distinct([[[1]]], 2) == 0.0


def test_numbers_keep_five_digits() -> None:
    value: dict[str, Any] = _plain({"a": torch.tensor([math.pi * 1e-7, -12345.678])})
    assert value == {"a": [3.1416e-07, -12346.0]}


@pytest.mark.parametrize("is_reference", [False, True], ids=["policy", "reference"])
def test_few_samples_by_hand(tiny: Tiny, moved: Path, is_reference: bool) -> None:
    """Which of the reference's samples a policy, and the reference itself, is compared with; each counts here."""
    model = tiny.model if is_reference else moved
    settings = {"samples": 2, "quantile_samples": 2, "bon_levels": [2], "forward_samples": 1, "examples": 0}
    kept = Scored(
        samples_of([[5, 6, 7, 8, 9, 10]] * 3), torch.tensor([[3.0, 1.0, 2.0, 7.0, 0.0, 5.0]] * 3, dtype=torch.float64)
    )
    drawn = kept
    if not is_reference:
        drawn = Scored(samples_of([[11, 12]] * 3), torch.tensor([[3.0, 6.0]] * 3, dtype=torch.float64))
    found = numbers(job_for(None if is_reference else moved, tiny, settings), drawn, kept)

    def same(key: str, value: float) -> None:
        assert found[key] == pytest.approx([value] * 3, rel=1e-4), key

    if is_reference:  # its first two, 3 and 1: beside its last two, 0 and 5; won against its last four, 2, 7, 0, 5
        same("win_rate", (2 + 1) / 8)
        same("quantile", 0.5)
        below, not_above = [1 / 3, 1 / 3], [2 / 3, 2 / 3]  # y counted among three
    else:  # 3 and 6: beside the reference's first two, 3 and 1; won against all six
        same("win_rate", (3.5 + 5) / 12)
        same("quantile", ((0.5 + 1) / 2 + 1) / 2)
        below, not_above = [1 / 3, 2 / 3], [3 / 3, 3 / 3]
    same("log_quantile", sum(math.log(p) for p in not_above) / 2)
    ratio = sum(math.log(a + b) for a, b in zip(below, not_above, strict=True)) / 2  # (a^2 - b^2) / (a - b), N = 2
    assert [b - k for b, k in zip(found["backward_kl"]["2"], found["kl"], strict=True)] == pytest.approx(
        [-ratio] * 3, abs=1e-4
    )
    # The best of the two that follow those of the quantiles: 7, token 8, above both of the first two.
    logs = [log_probs(path)[:, 8] for path in (tiny.model, model)]
    expected = math.log(2 / 3 + 1) + logs[0] - logs[1]
    assert found["forward_kl"]["2"] == pytest.approx(expected.tolist(), abs=1e-3)

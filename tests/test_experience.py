"""From samples to what an algorithm is given: rewards, and log-probabilities under each set of weights."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bond_plugin.algorithms import assemble
from bond_plugin.host import advantages, log_probs, plan, weights
from bond_plugin.host.advantages import (
    Batch,
    EngineGapError,
    compute_advantages_and_returns,
    cumulative_returns,
    engine_gaps,
)
from bond_plugin.host.rewards import RewardError


class Kept:
    """Weights beside the policy's, by what they add to every log-probability."""

    def __init__(self) -> None:
        self.held = "policy"

    @contextmanager
    def swapped_in(self, name: str) -> Any:
        self.held = name
        yield
        self.held = "policy"


def scored(
    monkeypatch: pytest.MonkeyPatch,
    rows: int = 1,
    dynamic: bool = False,
    images: int = 0,
    end: int = 12,
    **bond: Any,
) -> tuple[SimpleNamespace, list[tuple[str, float]]]:
    """The micro-batches from 2 on of a call, through a worker and the maker: the maker, and what was scored."""
    kept, done = Kept(), []
    monkeypatch.setattr(weights, "of", lambda _actor: kept)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="jbond")),
        bond=SimpleNamespace(**bond),
        data=SimpleNamespace(max_images_per_prompt=images),
        rollout=SimpleNamespace(n_samples_per_prompt=1, micro_batch_size=rows),
        train=SimpleNamespace(dynamic_batch_enable=dynamic, async_enable=False, seed=0),
    )
    worker = SimpleNamespace(actor=None, strategy=SimpleNamespace(args=args))
    under = {"policy": 0.0, "anchor": -0.5, "reference": -1.0}

    def original(_self: Any, _method: str, data: dict, start: int, end: int) -> list[torch.Tensor]:
        parts = data["x"][start:end]
        assert [len(mask) for mask in data["action_mask"][start:end]] == [len(part) for part in parts]
        done.extend((kept.held, value) for part in parts for value in part.tolist())
        return [part.unsqueeze(-1).expand(-1, 2) * under[kept.held] for part in parts]

    mask = torch.tensor([[1, 0]]).expand(rows, 2)
    call = {"x": list(torch.arange(20.0 * rows).split(rows)), "action_mask": [mask] * 20}
    found = log_probs.execute_batch(original, worker, "forward", call, 2, end)
    maker = SimpleNamespace(args=args)
    policy = log_probs.flatten_results(lambda *_: found, maker, None, 1)
    maker.experiences = [
        SimpleNamespace(
            action_log_probs=each,
            action_mask=mask,
            index=list(range(i * rows, (i + 1) * rows)),
            prompts=[str((i * rows + row) // plan.of(args).rows.all) for row in range(rows)],
            rewards=torch.zeros(rows),
            rollout_log_probs=None,
        )
        for i, each in enumerate(policy)
    ]
    return maker, done


def kl_ref(maker: SimpleNamespace) -> float:
    return maker.bond.metrics["bond/kl_ref"]


def given(monkeypatch: pytest.MonkeyPatch, maker: SimpleNamespace) -> set[str]:
    """Under which weights the algorithm is given log-probabilities."""
    under: set[str] = set()

    def made(_algorithm: Any, inputs: Any) -> Any:
        under.update(inputs.under)
        return SimpleNamespace(advantages=inputs.under["policy"] * 0, metrics={}, classifier_targets=None)

    monkeypatch.setattr(assemble, "advantages", made)
    monkeypatch.setattr(advantages, "for_training", lambda *_: None)
    compute_advantages_and_returns(lambda _self, there: there, maker, maker.experiences)
    return under


@pytest.mark.parametrize(
    "how",
    [{"rows": 8}, {"end": 4}, {"rows": 8, "dynamic": True, "end": 4}, {"rows": 8, "images": 1, "end": 4}],
    ids=["many", "of few rows", "dynamic", "with images"],
)
def test_a_report_alone_takes_one_micro_batch_of_four(monkeypatch: pytest.MonkeyPatch, how: dict) -> None:
    maker, done = scored(monkeypatch, **how)
    rows, end = how.get("rows", 1), how.get("end", 12)
    wanted = [i * rows + row for i in range(2, end, 4) for row in range(rows)]
    assert [value for name, value in done if name == "anchor"] == list(range(2 * rows, end * rows))
    assert [value for name, value in done if name == "reference"] == wanted
    assert given(monkeypatch, maker) == {"policy", "anchor"}
    assert kl_ref(maker) == pytest.approx(sum(wanted) / len(wanted))  # the second token is no response's


@pytest.mark.parametrize("rows", [4, 6, 8])
def test_a_report_alone_takes_one_row_of_four(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Where there are fewer than four micro-batches."""
    maker, done = scored(monkeypatch, rows, end=4)
    wanted = [i * rows + row for i in range(2, 4) for row in range(0, rows, 4)]
    assert [value for name, value in done if name == "reference"] == wanted
    given(monkeypatch, maker)
    assert kl_ref(maker) == pytest.approx(sum(wanted) / len(wanted))


@pytest.mark.parametrize("bond", [{"gamma_ref": 0.1}, {"n_anchor_samples": 2}], ids=["pull", "samples of the anchor"])
def test_where_they_are_needed_or_few_cannot_be_told_all_are_scored(
    monkeypatch: pytest.MonkeyPatch, bond: dict
) -> None:
    maker, done = scored(monkeypatch, **bond)
    assert [value for name, value in done if name == "reference"] == list(range(2, 12))
    assert given(monkeypatch, maker) == {"policy", "anchor", "reference"}


def test_without_the_report_the_initial_policy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    _, done = scored(monkeypatch, kl_ref=False)
    assert {name for name, _ in done} == {"policy", "anchor"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["jbond", "reinforce"])
def test_reward_that_is_no_number_is_an_error_that_names_the_prompt(estimator: str, value: float) -> None:
    """Of the host's estimators too."""
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator=estimator)),
        rollout=SimpleNamespace(n_samples_per_prompt=1),
    )
    maker = SimpleNamespace(args=args)
    experiences = [SimpleNamespace(prompts=["ab", "cd"], rewards=torch.tensor([1.0, 2.0]))]
    if estimator == "reinforce":
        assert compute_advantages_and_returns(lambda _self, given: given, maker, experiences) is experiences
    experiences[0].rewards[1] = value
    with pytest.raises(RewardError, match=f"the reward is {value} for the prompt 'cd'"):
        compute_advantages_and_returns(lambda _self, given: given, maker, experiences)


def experiences_of(generator: torch.Generator) -> list[SimpleNamespace]:
    """12 rows in three micro-batches of other orders than the rollout's, some responses in several turns or empty."""
    found = []
    for places in ([5, 0, 11, 2, 7], [1], [3, 4, 6, 8, 9, 10]):
        mask = (torch.rand(len(places), 9, generator=generator) < 0.6).long()
        mask[0] = 0 if len(places) > 1 else mask[0]
        prompts = [f"prompt {place // 3}" for place in places]
        values = torch.randn(mask.shape, generator=generator)
        found.append(SimpleNamespace(index=places, prompts=prompts, action_mask=mask, action_log_probs=values))
    return found


def test_tokens_go_from_micro_batches_to_prompts_and_back() -> None:
    """Against the definition, a token at a time."""
    experiences = experiences_of(torch.Generator().manual_seed(0))
    batch = Batch(experiences, 3)
    found = batch.tokens([e.action_log_probs for e in experiences])
    longest = max(int(e.action_mask.sum(dim=-1).max()) for e in experiences)
    assert found.dtype == torch.float64
    assert found.shape == (4, 3, longest)
    rows = {}
    for e in experiences:
        for place, values, mask in zip(e.index, e.action_log_probs.tolist(), e.action_mask.tolist(), strict=True):
            rows[place] = [value for value, kept in zip(values, mask, strict=True) if kept]
    expected = [rows[place] + [0.0] * (longest - len(rows[place])) for place in range(12)]
    assert found.flatten(0, 1).tolist() == expected

    advantages = torch.randn(4, 3, longest, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for given in (advantages, advantages[..., :1].expand(advantages.shape)):  # a number a token, or one a response
        batch.spread(given)
        for e in experiences:
            assert e.advantages.dtype == torch.float32
            for place, values, mask in zip(e.index, e.advantages, e.action_mask.bool(), strict=True):
                mine = given[place // 3, place % 3, : int(mask.sum())].float()
                assert values[mask].equal(mine)
                assert values[~mask].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_are_the_hosts_to_the_last_bit(gamma: float, dtype: torch.dtype) -> None:
    import inspect

    import transformers.modeling_utils  # noqa: F401, which looks for flash-attn

    from bond_plugin.host import cpu

    with cpu.flash_attn_stand_in():
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    original = inspect.unwrap(RemoteExperienceMaker.get_cumulative_returns)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 300, generator=generator).mul(torch.logspace(-6, 6, 300)).to(dtype)
    mask = (torch.rand(5, 300, generator=generator) < 0.7).long()
    mask[:, -20:] = 0  # a negative reward there is a negative zero, and the first sum
    calls = []

    def counted(*given: Any) -> torch.Tensor:
        calls.append(given)
        return original(*given)

    for kept in (mask, None):
        found = cumulative_returns(counted, None, rewards, kept, gamma)
        expected = original(None, rewards, kept, gamma)
        assert found.dtype == expected.dtype
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert found.view(bits).equal(expected.view(bits))
    assert bool(calls) == (gamma != 1.0 or dtype != torch.float32)


@pytest.mark.parametrize("limit", [None, 0.05])
def test_gaps_are_of_the_tokens_of_each_kind_of_rows(limit: float | None) -> None:
    """Two rows of the policy and one of the anchor a prompt: means over tokens, and an error beyond the limit."""
    experiences = experiences_of(torch.Generator().manual_seed(0))
    batch = Batch(experiences, 3)
    engine = batch.tokens([e.action_log_probs for e in experiences])
    filled = batch.in_order(batch.filled)
    sign = torch.where(torch.arange(engine.shape[-1]) % 2 == 0, 1.0, -1.0)
    under = {"policy": engine - 0.1 * sign, "anchor": engine - 0.02}
    if limit is not None:
        with pytest.raises(EngineGapError, match=r"bond/engine_gap_policy is 0\.100 nats a token, more than"):
            engine_gaps(engine, under, filled, 2, "anchor", limit)
        under["policy"] = engine - 0.01 * sign
    found = engine_gaps(engine, under, filled, 2, "anchor", limit)
    size = 0.1 if limit is None else 0.01
    mean = (size * sign).expand(engine.shape)[:, :2][filled[:, :2]].mean().item()
    assert found == pytest.approx({
        "bond/engine_gap_policy": size, "vllm_kl": mean, "bond/engine_gap_anchor": 0.02, "vllm_kl_anchor": 0.02,
        "bond/anchor_policy_gap": size,
    })  # fmt: skip
    pooled = engine_gaps(engine, under, filled, 3, "anchor", None)
    assert set(pooled) == {"bond/engine_gap_policy", "vllm_kl"}

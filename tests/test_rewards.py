"""Whatever a reward does ends with an error that names the prompt, and what it gives is one finite number."""

from __future__ import annotations

import asyncio
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bond_plugin.host import TIMEOUT_VARIABLE, rewards
from bond_plugin.host.rewards import RewardError


def scored(reward: Any) -> Any:
    """One sample through the host's own executor, the engine left out."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    host = SingleTurnAgentExecutor(None)
    host.reward_endpoints, host.reward_func = ["reward.py"], reward
    fetched = SingleTurnAgentExecutor._fetch_rewards_via_func

    async def sample(self: Any, prompt: str) -> dict[str, Any]:
        try:  # as the host does it
            (found,) = await rewards.fetch(fetched, self, [prompt + "x"], [prompt], [""])
        except Exception:
            found = {}
        return {"prompt": prompt, "reward": found.get("rewards")}

    return asyncio.run(rewards.execute(sample, host, "say"))


def leave(*_: Any) -> None:
    sys.exit(3)


def stop(*_: Any) -> None:
    raise StopIteration


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def fail(*_: Any) -> None:
    raise ValueError("no such label")


@pytest.mark.parametrize(
    ("reward", "cause"),
    [
        (leave, "SystemExit(3)"),
        (stop, "StopIteration()"),
        (interrupt, "KeyboardInterrupt()"),
        (fail, "no such label"),
    ],
)
def test_every_exception_of_a_reward_ends_the_run_with_its_prompt(reward: Any, cause: str) -> None:
    with pytest.raises(RewardError) as caught:
        scored(reward)
    assert "'say'" in str(caught.value) and cause in str(caught.value)
    traceback = caught.getrepr(chain=True)
    assert reward.__name__ in str(traceback)  # the user's own line


def test_a_reward_that_never_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.3")
    monkeypatch.setattr(rewards, "_SAY_EVERY", 0.1)
    monkeypatch.setattr(rewards, "_said", 0.0)
    with pytest.raises(RewardError, match=r"'say'.*--reward.timeout 0.3 s"):
        scored(lambda *_: time.sleep(1.0))
    said = capsys.readouterr().out
    assert 1 <= said.count("waiting for the reward of the prompt 'say'") <= 3


def test_a_server_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    pause = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda _: pause(0))
    host = SingleTurnAgentExecutor(["http://127.0.0.1:9/get_reward"])
    fetched = SingleTurnAgentExecutor._fetch_rewards_via_http

    async def sample(self: Any, prompt: str) -> dict[str, Any]:
        try:
            await rewards.fetch(fetched, self, [prompt], [prompt], [""])
        except Exception:
            return {"prompt": prompt, "reward": None}
        raise AssertionError

    with pytest.raises(RewardError, match=r"127.0.0.1:9.*'say'.*Cannot connect"):
        asyncio.run(rewards.execute(sample, host, "say"))


@pytest.mark.parametrize(
    "value", [1, 0.5, True, [2.0], [[2.0]], torch.tensor(1.5), torch.tensor([1], dtype=torch.bfloat16), np.float32(3)]
)
def test_one_number_in_any_dress(value: Any) -> None:
    found = rewards.number(value, "rewards")
    assert isinstance(found, float) and found == float(np.ravel(torch.as_tensor(value).float())[0])


@pytest.mark.parametrize("value", [torch.tensor([0.7], dtype=torch.float64), np.full(1, 0.7), [0.7], 0.7])
def test_a_reward_is_rounded_to_float32_wherever_it_comes_from(value: Any) -> None:
    assert scored(lambda *_: {"rewards": value})["reward"] == float(np.float32(0.7))


@pytest.mark.parametrize(
    "value", ["1.0", [1.0, 2.0], [], {}, 1e60, float("nan"), "x", torch.tensor([]), 10**400, [None], [["a"]]]
)
def test_what_is_not_one_finite_number(value: Any) -> None:
    with pytest.raises(RewardError, match="'say': rewards must be one finite number for a query, and is "):
        scored(lambda *_: {"rewards": value})


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (torch.tensor([1.0]), "a dictionary with one number under 'rewards'"),
        ([0.5], "a dictionary with one number under 'rewards'"),
        ({"reward": [0.5]}, "it gave {'reward'"),
        ({"rewards": None}, "it gave {'rewards': None}"),
        ({"rewards": 1.0, "scores": [1, 2]}, "scores must be one finite number"),
        ({"rewards": 1.0, "extra_logs": {"why": "short"}}, r"extra_logs\['why'\] must be one finite number"),
        ({"rewards": 1.0, "extra_logs": {"parts": {"a": 1.0}}}, r"extra_logs\['parts'\] must be"),
        ({"rewards": 1.0, "extra_logs": {"acc": None}}, r"extra_logs\['acc'\] must be"),
        ({"rewards": 1.0, "extra_logs": [{"acc": 1.0}]}, "'extra_logs' must be a dictionary"),
    ],
)
def test_an_answer_of_another_form(answer: Any, says: str) -> None:
    with pytest.raises(RewardError, match=f"'say': .*{says}"):
        scored(lambda *_: answer)


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_servers_answer_in_a_list(kind: str) -> None:
    from conftest import reward_server
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    with reward_server(lambda _: {"rewards": [0.5], "extra_logs": {"acc": [1.0]}}, kind) as url:
        host = SingleTurnAgentExecutor([url])
        fetched = SingleTurnAgentExecutor._fetch_rewards_via_http
        (found,) = asyncio.run(rewards.fetch(fetched, host, ["sayx"], ["say"], [""]))
    assert found == {"rewards": 0.5, "scores": None, "extra_logs": {"acc": 1.0}}


@pytest.mark.parametrize("wrong", [{"reward": float("nan")}, {"scores": [1, 2]}, {"extra_logs": {"length": "long"}}])
def test_a_response_of_any_executor_is_settled_before_the_host_takes_it(wrong: dict[str, Any]) -> None:
    good = {"prompt": "say", "reward": torch.tensor([0.1]), "scores": True, "extra_logs": {"step": torch.tensor(3)}}
    made = rewards.settle(lambda _self, response, **_: response, SimpleNamespace(), good)
    assert made["reward"] == pytest.approx(0.1) and made["scores"] == 1.0
    assert made["extra_logs"] == {"extra_logs/step": 3.0}
    with pytest.raises(RewardError, match="'say'"):
        rewards.settle(lambda _self, response, **_: response, SimpleNamespace(), good | wrong)

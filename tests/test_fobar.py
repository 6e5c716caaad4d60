"""Forward and backward shares exactly; answers by math-verify; and chains of thought of a real server of vLLM."""

from __future__ import annotations

import json
import operator
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import sums
import torch
from conftest import REPOSITORY, execute, load, recipe_for, to_argv, with_flags

from bond_plugin.bestofn.selectors import SELECTORS
from bond_plugin.rewards import answers, fobar

RECIPE = REPOSITORY / "recipes" / "rewards" / "fobar.py"


@pytest.mark.parametrize(("question", "wanted"), [
    ("Tom has 3 nuts and buys 12.", [("Tom has x nuts and buys 12.", "3"), ("Tom has 3 nuts and buys x.", "12")]),
    ("It costs $1,234.50 a day", [("It costs $x a day", "1,234.50")]),
    ("3+4", [("x+4", "3"), ("3+x", "4")]),
    ("Half of 50%?", [("Half of x%?", "50")]),
    ("On the 2nd day of B12 in version 1.2.3", []),
    ("How are you?", []),
])  # fmt: skip
def test_each_number_is_masked_in_turn(question: str, wanted: list[tuple[str, str]]) -> None:
    assert fobar.masked(question) == wanted


@pytest.mark.parametrize(("forward", "found", "chains", "alpha", "wanted"), [
    (0.25, 4, 16, 0.5, 0.25),
    (0.25, 1, 16, 0.5, 0.125),
    (0.25, 1, 16, 1.0, 0.25),  # forward alone
    (0.25, 1, 16, 0.0, 1 / 16),  # backward alone
    (0.0, 1, 16, 0.0, 1 / 16),
    (0.0, 16, 16, 0.5, 0.0),
    (0.36, 0, 0, 0.5, 0.6),  # no number in the question
    (0.36, 0, 0, 0.0, 1.0),
    (1.0, 0, 1, 0.5, 1e-4),  # the paper's epsilon
])  # fmt: skip
def test_the_two_shares_combined(forward: float, found: int, chains: int, alpha: float, wanted: float) -> None:
    assert fobar.score(forward, found, chains, alpha) == pytest.approx(wanted, rel=1e-6)


class Counted:
    """A server that answers from a table: what is asked of it, and by it, is exact."""

    chains = 4

    def __init__(self, alpha: float, forward: list[str | None], found: dict[str, tuple[int, int]]) -> None:
        self.alpha, self.forward, self.found = alpha, forward, found
        self.asked: list[str] = []

    def answers(self, question: str) -> list[str | None]:
        self.asked.append("forward")
        return self.forward

    def backward(self, question: str, answer: str) -> tuple[int, int]:
        self.asked.append(answer)
        return self.found[answer]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers that are their texts, and a server in place of the served one."""
    monkeypatch.setattr(fobar, "same", operator.eq)
    monkeypatch.setattr(fobar, "read", lambda text: text or None)

    def use(server: Counted) -> Counted:
        monkeypatch.setattr(fobar, "_server", lambda: server)
        fobar._asked.cache_clear()
        return server

    yield use
    fobar._asked.cache_clear()


def test_weighing_the_responses_to_a_question(table: Any) -> None:
    responses = ["7", "8", "8", "", "8", "7", "9", "9"]
    found = {"7": (8, 8), "8": (2, 8), "9": (0, 8)}
    raw = {"7": (2 / 8) ** 0.5, "8": (3 / 8 * 2 / 8) ** 0.5, "9": (2 / 8 * 1e-8 / 8) ** 0.5}
    server = table(Counted(0.5, [], found))
    wanted = [raw.get(text, 0.0) / sum(raw.values()) for text in responses]
    assert fobar.weigh("q", responses) == pytest.approx(wanted, rel=1e-6)
    assert sorted(server.asked) == ["7", "8", "9"]  # each answer once
    server = table(Counted(1.0, [], {}))
    assert fobar.weigh("q", responses) == pytest.approx(
        [{"7": 2, "8": 3, "9": 2, "": 0}[text] / 7 for text in responses]
    )
    assert server.asked == []
    table(Counted(0.0, [], found))
    assert fobar.weigh("q", responses)[:2] == pytest.approx([0.8, 0.2], rel=1e-6)
    # No answer leads back: the forward share decides. No answer at all: nothing does.
    table(Counted(0.5, [], dict.fromkeys("789", (0, 8))))
    assert fobar.weigh("q", ["7", "8", "8"]) == pytest.approx(
        [1 / (1 + 2**0.5), *[2**0.5 / (1 + 2**0.5)] * 2], rel=1e-6
    )
    assert fobar.weigh("q", ["", ""]) == [0.0, 0.0]


def test_a_reward_asks_once_for_a_question_and_an_answer(table: Any) -> None:
    server = table(Counted(0.5, ["7", "8", None, "8"], {"7": (8, 8), "8": (2, 8), "5": (8, 8)}))
    queries = [f"3+4{answer}" for answer in ("7", "8", "7", "5", "")]
    wanted = [0.5, (2 / 4 * 2 / 8) ** 0.5, 0.5, 0.0, 0.0]
    for _ in range(2):
        found = fobar.reward_func(queries, ["3+4"] * 5, [""] * 5)
        assert found["rewards"].tolist() == pytest.approx(wanted, rel=1e-6)
    assert server.asked == ["forward", "7", "8", "5"]
    # In the order of `weigh`.
    weights = fobar.weigh("3+4", ["7", "8", "8", ""])
    assert weights[0] / weights[1] == pytest.approx((1 / 4) ** 0.5 / (2 / 4 * 2 / 8) ** 0.5, rel=1e-6)


def test_different_answers_are_asked_for_at_the_same_time_and_equal_ones_once(table: Any) -> None:
    both = threading.Barrier(2, timeout=30)

    class Waiting(Counted):
        def backward(self, question: str, answer: str) -> tuple[int, int]:
            both.wait()  # for the other answer: one after the other they would wait for ever
            return super().backward(question, answer)

    server = table(Waiting(0.0, [], {"7": (8, 8), "8": (2, 8)}))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda answer: fobar.reward_func([f"q{answer}"], ["q"], [""])["rewards"].item(), "7878")
    assert list(found) == pytest.approx([1.0, 0.25, 1.0, 0.25], rel=1e-6)
    assert sorted(server.asked) == ["7", "8"]
    assert fobar.weigh("q", ["7", "8", "8"]) == pytest.approx([0.8, 0.2, 0.2], rel=1e-6)


def test_a_weighted_vote_of_backward_shares_selects_as_fobar_does(table: Any) -> None:
    """The sum of P_b over an answer's samples is N P_f P_b, whose order is that of P_f^1/2 P_b^1/2."""
    drawn = random.Random(0)
    for _ in range(50):
        responses = drawn.choices("789", k=8)
        found = {answer: (drawn.randint(0, 8), 8) for answer in "789"}
        table(Counted(0.5, [], found))
        weights = fobar.weigh("q", responses)
        table(Counted(0.0, [], found))
        backward = fobar.reward_func([f"q{one}" for one in responses], ["q"] * 8, [""] * 8)["rewards"]
        chances = SELECTORS["weighted"](backward, torch.tensor(list(map(int, responses))), 1.0)
        selected = [weight for weight, chance in zip(weights, chances, strict=True) if chance > 0]
        assert selected == pytest.approx([max(weights)] * len(selected), rel=1e-5)


@pytest.mark.parametrize(("settings", "says"), [
    ({}, "BOND_FOBAR_URL must be set: the address of a server"),
    ({"BOND_FOBAR_ALPHA": "1.5"}, "BOND_FOBAR_ALPHA must be a number from 0 to 1, got '1.5'"),
    ({"BOND_FOBAR_CHAINS": "0"}, "BOND_FOBAR_CHAINS must be a whole number of at least 1, got '0'"),
])  # fmt: skip
def test_settings(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str) -> None:
    fobar._server.cache_clear()
    if settings:
        monkeypatch.setenv("BOND_FOBAR_URL", "http://127.0.0.1:9/v1")
        monkeypatch.setenv("BOND_FOBAR_MODEL", "any")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        fobar.reward_func(["3+47"], ["3+4"], [""])


def test_without_math_verify_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(answers, "_process", answers._process.__wrapped__)
    with pytest.raises(ImportError, match=r"pip install 'openrlhf-bond\[fobar\]'"):
        answers.read("7")


@pytest.fixture
def math_verify() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed; it is in the extra `fobar`")


@pytest.mark.usefixtures("math_verify")
def test_answers_are_read_and_compared_as_numbers() -> None:
    read, same = answers.read, answers.same
    assert read("I do not know.") is None
    assert read("16 - 3 - 4 = 9, and 9 * 2 = 18. The answer is 18.").words == "18"
    assert read(r"So \boxed{3}, not 4.").words == "3"
    equal = [("1,234", "1234.0"), (r"\boxed{\frac{1}{2}}", "it is 0.5"), ("x = -3", "-3")]
    assert all(same(read(one), read(other)) for one, other in equal)
    assert not same(read("3"), read("-3")) and not same(read("12"), read("1.2"))


def wait_for_the_end_of(pid: int) -> None:
    deadline = time.monotonic() + 3
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "a process of the answers is left behind"
        time.sleep(0.1)


@pytest.mark.usefixtures("math_verify")
def test_an_answer_that_never_ends_is_given_up_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, three = answers.read(r"\boxed{10^{10^{10}}}"), answers.read("3")
    monkeypatch.setattr(answers, "_LIMIT", 1.0)
    found: list[Any] = []
    (busy,) = answers._process()._processes

    def compare() -> None:
        started = time.monotonic()
        found.extend([answers.same(tower, three), time.monotonic() - started])

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert found[0] is False and 0.9 < found[1] < 3
    wait_for_the_end_of(busy)
    monkeypatch.setattr(answers, "_LIMIT", 60.0)
    assert answers.same(answers.read("3"), three)  # by another process


LEFT = """
import os, signal
from bond_plugin.rewards import answers

if __name__ == "__main__":
    answers.read("7")
    print("answers in", *answers._process()._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("math_verify")
def test_the_process_ends_with_the_one_that_asks_it(tmp_path: Path) -> None:
    (tmp_path / "left.py").write_text(LEFT)
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    done = execute([sys.executable, str(tmp_path / "left.py")], tmp_path, PYTHONPATH=path)
    assert done.status == -signal.SIGKILL
    wait_for_the_end_of(int(re.search(r"answers in (\d+)", done.output)[1]))


@pytest.fixture(scope="module")
def adds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    assert sums.make(folder / "model") < 0.25
    return folder / "model"


@pytest.fixture(scope="module")
def url(adds: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sums.served(adds, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.mark.e2e
@pytest.mark.usefixtures("math_verify")
def test_a_server_of_vllm_and_the_answer_that_is_wrong_most_often(
    adds: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says a + b + 1 three times in five, and works out masked numbers rightly.

    Counting answers is then wrong more often than not, and answers that lead back to the question are right. Then
    `bond cache` with the model itself as the policy: its rewards tell right from wrong too.
    """
    settings = {"BOND_FOBAR_URL": url, "BOND_FOBAR_CHAINS": "32", "BOND_FOBAR_TOKENS": "4"}
    settings["BOND_FOBAR_TEMPERATURE"] = "1"
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fobar._server.cache_clear()
    server = fobar._server()
    by_count = by_both = 0
    for question in sums.QUESTIONS:
        drawn = [end.text for end in server.answers(question) if end is not None]
        right = str(sum(map(int, question.split("+"))))
        by_count += max(drawn, key=drawn.count) == right
        weights = fobar.weigh(question, drawn)
        by_both += drawn[weights.index(max(weights))] == right
        assert sum({text: weight for text, weight in zip(drawn, weights, strict=True)}.values()) == pytest.approx(1)
    print(f"right of {len(sums.QUESTIONS)}: {by_count} by counting, {by_both} forward and backward")
    assert by_both == len(sums.QUESTIONS) and by_count < len(sums.QUESTIONS) - 3
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"input": f"{q}="}) + "\n" for q in sums.QUESTIONS))
    flags = {"actor.model_name_or_path": str(adds), "data.prompt_dataset": str(tmp_path / "prompts.jsonl"),
             "data.max_samples": None, "reward.remote_url": str(RECIPE), "rollout.max_new_tokens": 4,
             "algo.advantage.estimator": "reinforce", "reward.transform": "vbon",
             "cache.output": str(tmp_path / "cache.jsonl"), "cache.samples": 8}  # fmt: skip
    from conftest import Tiny

    wanted = with_flags(recipe_for(Tiny(tmp_path)), flags)
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
    question = {"BOND_REWARD_QUESTION": "(.*)="}
    command = [sys.executable, "-m", "bond_plugin", "cache", *to_argv(wanted)]
    done = execute(command, tmp_path, OMP_NUM_THREADS="1", **settings, **question, **path)
    assert done.status == 0, done.said
    lines = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()[1:]]
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for line in lines:
        right = sum(map(int, line["prompt"].strip("=").split("+")))
        for text, reward in zip(line["responses"], line["rewards"], strict=True):
            rewards[text.replace("<eos>", "") == str(right)].append(reward)
    means = {key: sum(values) / len(values) for key, values in rewards.items()}
    print(f"mean reward {means}, {len(rewards[True])} right, {len(rewards[False])} wrong")
    assert min(rewards[True]) > 0.2 and max(rewards[False]) < 0.2
    assert len(rewards[True]) > 10 and len(rewards[False]) > 10
    monkeypatch.setenv("BOND_REWARD_QUESTION", "(.*)=")
    assert load(RECIPE).reward_func(["1+1=2<eos>"], ["1+1="], [""])["rewards"][0] > 0.2

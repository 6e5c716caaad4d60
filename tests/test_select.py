"""``bond select``: its selectors against all subsets, its errors, stopping and going on, and all of it with vLLM."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, Tiny, moved_model, to_argv

from bond_plugin.bestofn.selectors import SELECTORS, expected, pick, vote
from bond_plugin.cli.main import main
from bond_plugin.offline import engine
from bond_plugin.rewards.answers import SelectionError, boxed_or_last_line, parser

# Selectors.

REWARDS = torch.tensor([0.5, 1.5, 1.5, 0.0, 1.0], dtype=torch.float64)
ANSWERS = torch.tensor([0, 1, -1, 0, 1])


def test_each_selector_gives_the_probability_of_each_sample() -> None:
    given = {name: select(REWARDS, ANSWERS, 0.5).tolist() for name, select in SELECTORS.items()}
    assert given["best"] == [0, 0.5, 0.5, 0, 0]
    total = sum(math.exp(2 * reward) for reward in REWARDS.tolist())
    assert given["soft"] == pytest.approx([math.exp(2 * reward) / total for reward in REWARDS.tolist()])
    assert given["majority"] == [0.25, 0.25, 0, 0.25, 0.25]  # two answers with two votes each
    assert given["weighted"] == [0, 0.5, 0, 0, 0.5]  # 2.5 against 0.5; a sample without an answer has no vote
    # Two answers of the same weight are equally likely, however many samples they have.
    assert vote(torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.5, 0.5])).tolist() == [0.5, 0.25, 0.25]
    assert vote(torch.tensor([-1, -1, 0]), torch.ones(3)).tolist() == [0, 0, 1]
    assert vote(torch.tensor([-1, -1]), torch.ones(2)).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        vote(torch.tensor([0, 1]), torch.tensor([1.0, -1.0]))


def test_the_first_of_equals_or_one_at_random() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    assert pick(probabilities, None) == 1
    generator = torch.Generator().manual_seed(0)
    drawn = [pick(probabilities, generator) for _ in range(2000)]
    assert 0 not in drawn
    assert sum(one == 2 for one in drawn) == pytest.approx(1500, abs=4 * (2000 * 0.75 * 0.25) ** 0.5)


@pytest.mark.parametrize("name", SELECTORS)
def test_expected_is_the_mean_over_all_subsets(name: str) -> None:
    rewards, answers = torch.tensor([0.5, 1, 1, 0, 0.25, 2]).double(), torch.tensor([0, 1, -1, 0, 1, 2])
    values = torch.tensor([1.0, 0, 1, 1, 0, 5])
    for n in range(1, 7):
        each = []
        for places in map(list, itertools.combinations(range(6), n)):
            each.append(SELECTORS[name](rewards[places], answers[places], 0.7) @ values[places].double())
        error = torch.stack(each).std(correction=0).item() / 4000**0.5
        found = expected(name, rewards, answers, values, n, temperature=0.7, seed=n, subsets=4000)
        assert found == pytest.approx(torch.stack(each).mean().item(), abs=1e-9 + (name != "best") * 4 * error)


# Answers.


def test_an_answer_is_what_is_boxed_or_the_last_line() -> None:
    given = [
        "so \\boxed{1} or \\boxed{\\frac{1}{2}}",
        "\\boxed{0.5}",
        "it is\n 1/2 \n\n",
        "x = 3",
        "\\boxed{}",
        " \n",
    ]
    half = "\\frac{1}{2}"
    assert [boxed_or_last_line(one) for one in given] == [half, half, half, "3", None, None]


def test_an_answer_function_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    path = tmp_path / "answer.py"
    path.write_text("def answer_func(response):\n    return response[:1]\n")
    assert [parser(path)(one) for one in ("ab", "")] == ["a", None]
    for text, says in (
        ("x = 1", "defines no answer_func"),
        ("1 / 0", "ZeroDivisionError"),
        ("def answer_func(response): return 1", "a text or None, and gave 1"),
        ("def answer_func(response): return response[0]", "failed on the response '': IndexError"),
    ):
        path.write_text(text)
        with pytest.raises(SelectionError, match=says):
            parser(path)
    with pytest.raises(SelectionError, match="no such file"):
        parser(tmp_path / "none.py")


# The command, with responses that are given.


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS = [
    {"prompt": "a", "label": 7, "responses": ["x\n7", "y\n8", "z\n7", "8", "7"], "rewards": [0.5, 2, 0.25, 1, 0]},
    {"prompt": "b", "label": "2", "responses": ["1", "1", "2", "2", "1"], "rewards": [0.5, 0.5, 2, 2, 0.5]},
]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return write(tmp_path / "given.jsonl", {"bond_cache": 1, "samples": 5}, *ROWS)


def select(**flags: Any) -> int:
    try:
        return main(["select", *to_argv({name.replace("_", "-"): value for name, value in flags.items()})])
    except SystemExit as stop:
        return stop.code


def test_one_line_a_prompt_says_what_was_selected(given: Path, tmp_path: Path, capsys: Any) -> None:
    found = {}
    for name in ("best", "majority", "weighted"):
        assert select(responses=given, selector=name, output=tmp_path / name) == 0
        found[name] = [(line["selected"], line["response"], line["reward"]) for line in read(tmp_path / name)]
    assert found["best"] == [(1, "y\n8", 2), (2, "2", 2)]
    assert found["majority"] == [(0, "x\n7", 0.5), (0, "1", 0.5)]
    assert found["weighted"] == [(1, "y\n8", 2), (2, "2", 2)]
    line = read(tmp_path / "weighted")[0]
    assert (line["rewards"], line["answers"], line["answer"]) == (ROWS[0]["rewards"], ["7", "8", "7", "8", "7"], "8")
    assert line["label"] == 7 and "responses" not in line and "answers" not in read(tmp_path / "best")[0]
    # What --keep-responses writes can be selected from again, and no reward is needed for a majority.
    assert select(responses=given, samples=3, keep_responses=True, output=tmp_path / "kept") == 0
    assert [len(line["responses"]) for line in read(tmp_path / "kept")] == [3, 3]
    assert select(responses=tmp_path / "kept", selector="soft", reward_temperature=1e-3, output=tmp_path / "s") == 0
    assert [line["reward"] for line in read(tmp_path / "s")] == [2, 2]
    bare = write(tmp_path / "bare.jsonl", *({"prompt": row["prompt"], "responses": row["responses"]} for row in ROWS))
    assert select(responses=bare, selector="majority", output=tmp_path / "m") == 0
    assert [line["answer"] for line in read(tmp_path / "m")] == ["7", "1"]
    capsys.readouterr()


@pytest.mark.parametrize("end", ["<eos>", "<|im_end|>", "</s>"])
def test_special_tokens_are_no_part_of_an_answer(end: str, tmp_path: Path, capsys: Any) -> None:
    """As `--keep-responses` and `bond cache` write them: equal answers are equal, and labels are found."""
    texts = [f"{text}{end}" for text in ROWS[0]["responses"]]
    ended = write(tmp_path / "r.jsonl", {**ROWS[0], "responses": [*texts[:4], "7"]})
    assert select(responses=ended, selector="majority", label_is_answer=True, output=tmp_path / "m") == 0
    (line,) = read(tmp_path / "m")
    assert (line["answers"], line["response"]) == (["7", "8", "7", "8", "7"], "x\n7")
    accuracy = numbers(capsys.readouterr().out, "accuracy")["majority"]
    assert (accuracy[1], accuracy[5]) == (0.6, 1.0)


def numbers(printed: str, title: str) -> dict[str, dict[int, float]]:
    """A part of the table: selector to N to the mean."""
    lines = printed[printed.index(f"\n{title} ") + 1 :].split("\n\n")[0].splitlines()
    rows = [line.replace("[", " ").replace("]", " ").replace(",", " ").split() for line in lines]
    return {name: {int(row[2]): float(row[3 + 3 * i]) for row in rows[1:]} for i, name in enumerate(rows[0][1:])}


def test_the_table_says_what_each_n_gives(given: Path, tmp_path: Path, capsys: Any) -> None:
    assert select(responses=given, selector="majority", label_is_answer=True, output=tmp_path / "m") == 0
    printed = capsys.readouterr().out
    reward, accuracy = numbers(printed, "reward"), numbers(printed, "accuracy")
    assert set(reward) == {"best", "majority"} and set(accuracy) == set(SELECTORS)
    assert set(reward["best"]) == {1, 2, 4, 5}
    by_hand = [
        sum(max(row["rewards"][j] for j in places) for places in itertools.combinations(range(5), 2)) / 10
        for row in ROWS
    ]
    assert reward["best"][2] == pytest.approx(sum(by_hand) / 2, abs=6e-4)
    assert all(accuracy[name][1] == 0.5 for name in SELECTORS)  # 3 of 5 and 2 of 5 are right
    assert accuracy["best"][5] == 0.5  # the second prompt's
    assert accuracy["majority"][5] == 0.5  # the first prompt's
    assert "[0.000, 1.000]" in printed
    # Rewards of 0 and 1 are the accuracy themselves.
    rows = [{**row, "rewards": [1, 0, 0, 0, 0]} for row in ROWS]
    assert select(responses=write(tmp_path / "r.jsonl", *rows), output=tmp_path / "b") == 0
    printed = capsys.readouterr().out
    assert numbers(printed, "accuracy")["best"] == {1: 0.2, 2: 0.4, 4: 0.8, 5: 1.0}
    assert "\nreward" not in printed


def test_stopped_anywhere_it_goes_on_and_other_settings_are_refused(given: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "out" / "s.jsonl"
    flags = {"responses": given, "selector": "soft", "output": path}
    assert select(**flags) == 0
    whole, printed = path.read_bytes(), capsys.readouterr().out
    for length in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:length])
        assert select(**flags) == 0
        assert path.read_bytes() == whole, length
        assert capsys.readouterr().out.split("\n\n", 1)[1] == printed.split("\n\n", 1)[1]
    assert select(**{**flags, "reward_temperature": 0.5}) == 2
    assert "begun with other settings:\n  - --reward-temperature: 1.0 in the file, 0.5 now" in capsys.readouterr().err
    given.write_text(given.read_text().replace("0.25", "0.75"))
    assert select(**flags) == 2
    assert "--responses: " in capsys.readouterr().err
    foreign = write(tmp_path / "notes.jsonl", {"prompt": "a"}, '{"unfin')
    before = foreign.read_bytes()
    assert select(**{**flags, "output": foreign}) == 2
    assert "no notes.jsonl.settings.json beside it" in capsys.readouterr().err
    assert (path.read_bytes(), foreign.read_bytes()) == (whole, before)


def no_sampling(*_: Any, **__: Any) -> Any:
    raise AssertionError("sampling was started")


MISTAKES: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "neither": ({"responses": None}, ["--prompts or --responses"]),
    "both": ({"prompts": "{prompts}"}, ["--prompts or --responses"]),
    "no model": ({"prompts": "{prompts}", "responses": None}, ["--model is missing"]),
    "no reward": ({"prompts": "{prompts}", "responses": None, "model": "{model}"}, ["--reward is missing", "best"]),
    "no label": (
        {"prompts": "{prompts}", "responses": None, "model": "{model}", "selector": "majority",
         "label_is_answer": True},
        ["--label-key is missing"],
    ),
    "no such model": (
        {"prompts": "{prompts}", "responses": None, "model": "{folder}/no", "selector": "majority"},
        ["--model", "no such folder"],
    ),
    "no such prompts": (
        {"prompts": "{folder}/no.jsonl", "responses": None, "model": "{model}", "reward": "{reward}"},
        ["--prompts", "no such file"],
    ),
    "template": ({"input_template": "Q: {}"}, ["--input-template goes with --prompts"]),
    "no such responses": ({"responses": "{folder}/no.jsonl"}, ["--responses", "no such file"]),
    "no lines": ({"responses": "{folder}/empty.jsonl"}, ["--responses", "no prompts"]),
    "no JSON": ({"responses": "{folder}/text.jsonl"}, ["--responses", "line 1 is not JSON"]),
    "no rewards": ({"responses": "{folder}/bare.jsonl"}, ["--reward is missing", "'a'"]),
    "lengths": ({"responses": "{folder}/short.jsonl"}, ["line 1", "differ in length"]),
    "no responses": ({"responses": "{folder}/none.jsonl"}, ["'a' has 0 'responses' of 1"]),
    "too few": ({"samples": 6}, ["'a' has 5 'responses' of 6"]),
    "no samples": ({"samples": 0}, ["--samples must be at least 1"]),
    "cold": ({"reward_temperature": 0}, ["--reward-temperature must be above 0"]),
    "no such reward": ({"reward": "{folder}/no.py"}, ["--reward", "no such file"]),
    "reward raises": ({"reward": "{folder}/raises.py"}, ["--reward", "the judge is out"]),
    "no such answer": ({"answer": "{folder}/no.py"}, ["--answer", "no such file"]),
    "no answer": ({"answer": "{folder}/raises.py"}, ["--answer", "defines no answer_func"]),
    "label no answer": ({"responses": "{folder}/bare.jsonl", "selector": "majority", "label_is_answer": True},
                        ["--label-is-answer", "'a'", "None"]),
    "output a folder": ({"output": "{folder}"}, ["--output", "a folder"]),
    "output below a file": ({"output": "{folder}/given.jsonl/x"}, ["--output", "a file is where"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_anything_is_sampled(
    mistake: str, tiny: Tiny, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(engine, "stream", no_sampling)
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "text.jsonl", "hello")
    write(tmp_path / "bare.jsonl", {"prompt": "a", "responses": ["x"]})
    write(tmp_path / "short.jsonl", {"prompt": "a", "responses": ["x"], "rewards": [1, 2]})
    write(tmp_path / "none.jsonl", {"prompt": "a", "rewards": [1, 2]})
    raises = "def reward_func(queries, prompts, labels):\n    raise RuntimeError('the judge is out')"
    write(tmp_path / "raises.py", raises)
    names = {"folder": tmp_path, "prompts": tiny.prompts, "model": tiny.model, "reward": tiny.reward}
    flags, words = MISTAKES[mistake]
    flags = {"responses": given, "output": tmp_path / "o.jsonl", **flags}
    filled = {k: v.format(**names) if isinstance(v, str) and v != "Q: {}" else v for k, v in flags.items()}
    assert select(**filled) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("bond select: error: --")
    for word in words:
        assert word in message
    assert not (tmp_path / "o.jsonl").exists()


def test_what_fails_on_the_way_is_status_1_and_keeps_what_is_written(tmp_path: Path, capsys: Any) -> None:
    rows = [ROWS[0], {**ROWS[1], "rewards": [1, 1, 1, 1, -2]}]
    path = tmp_path / "s.jsonl"
    assert select(responses=write(tmp_path / "r.jsonl", *rows), selector="weighted", output=path) == 1
    assert "--selector weighted, the prompt 'b': votes are weighted with numbers of at least 0, got -2" in (
        capsys.readouterr().err
    )
    assert len(read(path)) == 1


def test_help_teaches(capsys: Any) -> None:
    assert select(help=True) == 0
    printed = capsys.readouterr().out
    for words in ("exp(reward / t)", "2505.03156", "goes on", "--label-is-answer", "bond select --responses"):
        assert words in printed


def test_a_reward_model_scores_responses_that_are_given(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny.model)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.save_pretrained(tmp_path / "rm")
    texts = ["abc<eos>", "e", "zz<eos>"]
    bare = write(tmp_path / "r.jsonl", {"prompt": "hi", "responses": texts})
    assert select(responses=bare, reward=tmp_path / "rm", output=tmp_path / "s") == 0
    (line,) = read(tmp_path / "s")
    for text, reward in zip(texts, line["rewards"], strict=True):
        with torch.no_grad():
            ids = tokenizer("hi" + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            assert reward == pytest.approx(model.score(model.model(ids).last_hidden_state[0, -1]).item(), abs=0.02)
    assert line["response"] == texts[line["rewards"].index(max(line["rewards"]))].removesuffix("<eos>")
    assert len(set(line["rewards"])) == 3
    capsys.readouterr()


# Sampling.


def test_sampled_responses_are_scored_selected_and_drawn_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[list[str]] = []

    def stream(model: Path, prompts: list[str], n: int, *, chunk: int, **how: Any) -> Iterator[list[Any]]:
        assert (model, n, how["max_new_tokens"], how["seed"]) == (tiny.model, 3, 512, 4)
        asked.append(prompts)
        for start in range(0, len(prompts), chunk):
            part = prompts[start : start + chunk]
            texts = ["xy<eos>", "ae<eos>", "ax<eos>"]
            yield [engine.PromptSamples([2], [[3]] * 3, [prompt + text for text in texts], texts) for prompt in part]

    monkeypatch.setattr(engine, "stream", stream)
    monkeypatch.setattr(engine, "chunk_of", lambda count: 2)
    prompts = write(tmp_path / "p.jsonl", *({"input": text} for text in ("abc", "d", "abc", "e", "f")))
    flags = {"model": tiny.model, "prompts": prompts, "reward": tiny.reward, "samples": 3, "seed": 4}
    path = tmp_path / "s.jsonl"
    assert select(**flags, output=path) == 0
    assert [line["prompt"] for line in read(path)] == ["abc", "d", "abc", "e", "f"]
    assert all((line["response"], line["rewards"]) == ("ae", [0, 1, 0.5]) for line in read(path))
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert select(**flags, output=path) == 0
    assert "5 prompts into" in (printed := capsys.readouterr().out) and "3 are there already" in printed
    assert path.read_bytes() == whole
    assert asked[1] == ["abc", "e", "f"]  # the chunk that is there in part, as a whole


@pytest.mark.e2e
def test_whole_command_with_vllm(tiny: Tiny, bond_command: Callable[..., Run], tmp_path: Path) -> None:
    model = moved_model(tiny.model, tmp_path / "model", 7, 0.05)
    # Long prompts, more than vLLM computes at once: one that it cut in two it could not sample on a CPU.
    texts = [*("abcd"[i:] for i in range(3)), *("abcdefghij"[i:] * 400 for i in range(3))]
    prompts = write(tmp_path / "p.jsonl", *({"input": text} for text in texts))
    path = tmp_path / "s.jsonl"
    flags = {"model": model, "prompts": prompts, "reward": tiny.reward, "samples": 8, "max-new-tokens": 8}
    argv = ["select", *to_argv({**flags, "output": path}), "--keep-responses"]
    done = bond_command(tmp_path / "run", *argv)
    lines = read(path)
    assert [line["prompt"] for line in lines] == texts
    sys.path.insert(0, str(tiny.folder))
    try:
        from reward import reward_func
    finally:
        sys.path.remove(str(tiny.folder))
    for line in lines:
        queries = [line["prompt"] + response for response in line["responses"]]
        rewards = reward_func(queries, [line["prompt"]] * 8, None)["rewards"].tolist()
        assert line["rewards"] == pytest.approx(rewards)
        assert line["reward"] == max(rewards) and line["selected"] == rewards.index(max(rewards))
        assert line["response"] == line["responses"][line["selected"]].replace("<eos>", "").replace("<pad>", "")
        assert len(set(line["responses"])) > 3
    best = numbers(done.output, "reward")["best"]
    assert best[1] == pytest.approx(sum(sum(line["rewards"]) for line in lines) / 48, abs=6e-4)
    assert best[8] == pytest.approx(sum(line["reward"] for line in lines) / 6, abs=6e-4)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    bond_command(tmp_path / "again", *argv)
    assert path.read_bytes() == whole

"""``bond cache --cache.responses_key``: a cache made of responses and rewards that the data has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny

from bond_plugin.offline.reward_cache import read_cache

QRPO = {"algo.advantage.estimator": "qrpo", "bond.beta": 0.3, "rollout.temperature": 0.7}
KEYS = {"data.input_key": "prompt", "cache.responses_key": "C", "cache.rewards_key": "R"}
#: What the rows of each layout hold. Of "ab" one response fits to the token, one is a token longer.
RESPONSES = {
    "abcd": (["ab", "abcdefghi", "abcdefghij", "x"], [0.5, 1.0, 9.0, -2.5]),
    "efgh": (["", "zz<eos>"], [0.25, 0.25]),
}
FIT = {"abcd": (["ab", "abcdefghi", "x"], [0.5, 1.0, -2.5]), "efgh": RESPONSES["efgh"]}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def lists(shape: Callable[[list[str]], Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "C": shape(texts), "R": rewards} for prompt, (texts, rewards) in RESPONSES.items()]


LAYOUTS = {
    "a line a prompt": lists(list),
    "a line a prompt, one of them twice": lists(list) + lists(list)[:1],
    "conversations": lists(lambda texts: [[{"role": "user", "content": "?"}, said(text)] for text in texts]),
    "published with QRPO": lists(lambda texts: [{"role": "user", "content": "?"}, said(json.dumps(texts))]),
    "a line a sample": [
        {"prompt": prompt, "C": texts[j], "R": rewards[j]}
        for j in range(4)
        for prompt, (texts, rewards) in RESPONSES.items()
        if j < len(texts)
    ],
}


@pytest.fixture
def bond_cache(dry: Any, tmp_path: Path) -> Callable[..., Any]:
    """``bond_cache(rows, output, **flags)``: all of ``bond cache`` in this process."""

    def run(rows: list[dict[str, Any]], output: Path, kind: str = "data.jsonl", **flags: Any) -> Any:
        from datasets import Dataset

        data = tmp_path / kind
        if data.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(data)
        else:
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {**QRPO, **KEYS, "data.prompt_dataset": data, "cache.output": output, **flags}
        return dry({name: value for name, value in given.items() if value}, command="cache", dry_run=False)

    return run


def log_probs(tiny: Tiny, prompt: str, ids: list[int]) -> list[float]:
    """Of each token of a response at temperature 0.7, by the model itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    before = AutoTokenizer.from_pretrained(tiny.model)(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]
    return (logits / 0.7).log_softmax(-1)[range(len(ids)), ids].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_becomes_the_same_cache(layout: str, bond_cache: Any, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    done = bond_cache(LAYOUTS[layout], path, **{"cache.log_probs": True})
    assert done.status == 0, done.text
    assert f"{tmp_path / 'data.jsonl'} (1 of 6 do not fit --rollout.max_new_tokens 10 with their EOS" in done.out
    found, items = read_cache(path), [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert found.record["reward"] == {"kind": "column", "name": "R", "data": str(tmp_path / "data.jsonl")}
    assert {item["prompt"]: (item["responses"], item["rewards"]) for item in items} == FIT
    assert [len(one.tokens) for one in found.stored("abcd")] == [3, 10, 2]
    assert [one.tokens for one in found.stored("efgh")] == [[1], [27, 27, 1]]  # one EOS, and not another
    for prompt in FIT:
        for one in found.stored(prompt):
            assert one.log_probs == pytest.approx(log_probs(tiny, prompt, one.tokens), abs=1e-5)


def test_a_table_gives_the_same(bond_cache: Any, tmp_path: Path) -> None:
    for layout, kind in (("a line a prompt", "data.jsonl"), ("published with QRPO", "data.parquet")):
        assert bond_cache(LAYOUTS[layout], tmp_path / f"{kind}.cache", kind).status == 0
    first, second = (tmp_path / f"{kind}.cache" for kind in ("data.jsonl", "data.parquet"))
    assert '"tokens"' not in first.read_text()
    assert first.read_text().splitlines()[1:] == second.read_text().splitlines()[1:]


def test_it_goes_on_where_it_was_and_training_takes_it(bond_cache: Any, dry: Any, tmp_path: Path) -> None:
    path, rows = tmp_path / "r.jsonl", LAYOUTS["a line a prompt"]
    flags = {"cache.log_probs": True, "cache.samples": 2}
    assert bond_cache(rows, path, **flags).status == 0
    whole = path.read_bytes()
    assert [len(entry.rewards) for entry in read_cache(path).values()] == [2, 2]  # the first two that fit
    path.write_bytes(whole[:-30])
    done = bond_cache(rows, path, **flags)
    assert "1 prompts are there already" in done.out
    assert path.read_bytes() == whole
    done = bond_cache(rows, path, **flags, **{"cache.responses_key": "D", "cache.rewards_key": "C"})
    assert done.status == 1
    assert "has no key 'D': set --data.input_key or --cache.responses_key" in done.text
    done = bond_cache([{**row, "D": row["C"], "E": row["R"]} for row in rows], path,
                      **flags, **{"cache.responses_key": "D", "cache.rewards_key": "E"})  # fmt: skip
    assert "the reward: column, R, data" in done.text and "--cache.responses_key: C in the file, D now" in done.text

    data = {**QRPO, "data.input_key": "prompt", "data.prompt_dataset": tmp_path / "data.jsonl"}
    data |= {"bond.reward_cache": path, "rollout.n_samples_per_prompt": 2, "train.batch_size": 32}
    done = dry({**data, "bond.offline": True})
    assert done.status == 0, done.text
    assert "note: rewards of training are those of the column 'R' that" in done.out
    done = dry({**data, "bond.offline": True, "rollout.temperature": 0.8})
    assert done.status == 2
    assert "--rollout.temperature: 0.7 in the cache, 0.8 in this run" in done.text and "the reward" not in done.text
    done = dry(data)  # on samples that the run's own reward scores
    assert done.status == 2
    assert "the reward: column, R, data" in done.text and "Python file" in done.text
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "new", "C": ["a", "b"], "R": [0, 1]}) + "\n")
    done = dry({**data, "bond.offline": True})
    assert "This adds what is missing: bond cache" in done.text
    assert "--cache.responses_key=C --cache.rewards_key=R --cache.log_probs" in done.text


def row(texts: Any, rewards: Any) -> dict[str, Any]:
    return {"prompt": "ijkl", "C": texts, "R": rewards}


WRONG: list[tuple[dict[str, Any], str]] = [
    (row(["a", "b"], [1.0]), "row 3, 'C' and 'R': 2 responses, 1 rewards"),
    (row(["a", "b"], [1.0, 1e39]), "row 3, 'R': 1: a reward is 1e+39"),
    (row(["a", "b"], [1.0, None]), "row 3, 'R': 1: must be a valid number, got None"),
    (row(["a", None], [1.0, 1.0]), "row 3, 'C': 1: must be a valid string, got None"),
    (row([], []), "row 3, 'C': List should have at least 1 item"),
    (row(None, [1.0]), "row 3, 'C': must be a valid list, got None"),
    ({"prompt": "ijkl", "C": ["a"]}, "row 3, 'C': 0: must be a valid string, got ['a']"),
    (row(["a"], [1.0]), "'C': the prompt 'ijkl' has 1 responses that fit --rollout.max_new_tokens 10 with their EOS, "
     "and needs 2: give"),
    (row(["abcdefghij"] * 3, [1.0] * 3), "'C': the prompt 'ijkl' has 0 responses that fit"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[says for _, says in WRONG])
def test_errors_name_file_row_and_column_before_a_model_is_loaded(
    wrong: dict[str, Any], says: str, bond_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bond_plugin.offline.likelihood.load", None)
    done = bond_cache([*LAYOUTS["a line a prompt"], wrong], tmp_path / "r.jsonl", **{"cache.log_probs": True})
    assert done.status == 1, done.text
    assert f"bond cache: error: {tmp_path / 'data.jsonl'}, {says}" in done.text
    assert not (tmp_path / "r.jsonl").exists()


def test_a_conversation_that_ends_with_no_list(bond_cache: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "abcd", "C": [said("hello")], "R": [1.0]}]
    done = bond_cache(rows, tmp_path / "r.jsonl")
    assert done.status == 1
    assert "data.jsonl, row 1, 'C': the conversation ends with no JSON list of texts: Expecting value" in done.text


def test_the_two_keys_go_together(bond_cache: Any, tmp_path: Path) -> None:
    done = bond_cache(LAYOUTS["a line a prompt"], tmp_path / "r.jsonl", **{"cache.rewards_key": None})
    assert done.status == 2
    assert "--cache.responses_key and --cache.rewards_key go together" in done.text

"""The reward cache: its file and every error of it, resuming, what a run refuses, ``bond cache`` with real vLLM."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run, Tiny, clean_environment, recipe_for, reward_server, to_argv, with_flags

from bond_plugin.files import Busy, ContentError
from bond_plugin.offline import engine, fingerprints
from bond_plugin.offline import reward_cache as cache
from bond_plugin.offline.engine import PromptSamples
from bond_plugin.offline.prompts import DataError, tokenizer_of, training_prompts
from bond_plugin.offline.reward_cache import read_cache

RECORD = {"model": {"name": "m", "sha256": "aa"}, "temperature": 1.0, "samples": 3, "seed": 0}


def lines(*items: Any) -> str:
    return "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items)


def write(path: Path, *items: Any) -> Path:
    path.write_text(lines(*items), encoding="utf-8")
    return path


# The file.


def test_both_layouts_of_the_authors_give_the_same_rewards(tmp_path: Path) -> None:
    by_sample = write(
        tmp_path / "samples.jsonl",
        {"prompt": "a", "text": "x", "reward": 0.1},
        {"prompt": "b", "text": "x", "reward": 3},
        {"prompt": "a", "text": "y", "reward": -2.5},
        {"prompt": "b", "text": "x", "reward": 3},
    )
    by_prompt = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "a", "responses": ["x", "y"], "rewards": [0.1, -2.5]},
        {"prompt": "b", "responses": ["x", "x"], "rewards": [3, 3]},
    )
    for path in (by_sample, by_prompt):
        found = read_cache(path)
        assert found.record is None
        assert list(found) == ["a", "b"]
        assert found.samples() == 2
        rewards = found.rewards(["b", "a", "b"])
        assert rewards.dtype == torch.float64
        # Not 0.1: the host's rewards are float32, and a tie there must be a tie here.
        assert rewards.tolist() == [[3, 3], [torch.tensor(0.1).double().item(), -2.5], [3, 3]]
        assert sorted(cache.cached_responses(path)) == ["x", "x", "x", "y"]


def test_the_first_samples_are_taken_as_many_as_asked_or_as_every_prompt_has(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl", {"prompt": "a", "rewards": [1, 2, 3]}, {"prompt": "b", "rewards": [4, 5, 6, 7]}
    )
    found = read_cache(path)
    assert found.rewards(["b", "a"]).tolist() == [[4, 5, 6], [1, 2, 3]]
    assert found.rewards(["b"], 2).tolist() == [[4, 5]]
    assert found.samples(["b"]) == 4
    with pytest.raises(ContentError, match=r"r\.jsonl, line 1: the prompt 'a' has 3 samples, 4 are asked for"):
        found.rewards(["b", "a"], 4)
    with pytest.raises(ContentError, match="no rewards of the prompt 'c' \\(and of 1 others\\)"):
        found.check(["a", "c", "d"])


UNREADABLE: list[tuple[list[Any], str]] = [
    (["hello"], "line 1 is not JSON"),
    ([{"prompt": "a", "rewards": [1]}, '{"prompt": "b", "rew'], "line 2 is not JSON"),
    ([[1, 2]], "line 1 is not of a reward cache"),
    ([{"text": "a", "reward": 1}], "line 1 is not of a reward cache"),
    ([{"prompt": 3, "rewards": [1]}], "line 1 is not of a reward cache"),
    ([{"prompt": "a", "text": "x"}], "line 1, prompt 'a': it has neither"),
    ([{"prompt": "a", "reward": 1, "rewards": [1]}], "line 1, prompt 'a': it has both"),
    ([{"prompt": "a", "rewards": None}], "line 1, prompt 'a': it has neither"),
    ([{"prompt": "a", "rewards": 1}], "line 1, prompt 'a': rewards: .*list"),
    ([{"prompt": "a", "rewards": []}], "line 1, prompt 'a': rewards: .*at least 1"),
    ([{"prompt": "a", "rewards": [1, "2"]}], "line 1, prompt 'a': rewards.1: .*'2'"),
    ([{"prompt": "a", "rewards": [1, True]}], "line 1, prompt 'a': rewards.1: .*True"),
    ([{"prompt": "a", "rewards": [None]}], "line 1, prompt 'a': rewards.0: .*None"),
    ([{"prompt": "a", "rewards": [1, math.nan]}], "line 1, prompt 'a': rewards.1: a reward is nan"),
    ([{"prompt": "z", "rewards": [1]}, {"prompt": "a", "text": "x", "reward": math.inf}], "line 2, .*inf"),
    ([{"prompt": "a", "rewards": [1e39]}], "line 1, prompt 'a': rewards.0: a reward is 1e\\+39"),
    ([{"prompt": "a", "rewards": [10**400]}], "line 1, prompt 'a': rewards.0: .*1000"),
    ([{"prompt": "a", "responses": ["x"], "rewards": [1, 2]}], "line 1, .*'responses' and 'rewards' differ"),
    ([{"prompt": "a", "rewards": [1]}, "", {"prompt": "a", "rewards": [2]}], "line 3, .*: line 1 has other"),
    ([{"prompt": "a", "rewards": [1]}, {"prompt": "a", "text": "x", "reward": 1}], "line 2, .*: line 1 has other"),
    ([{"prompt": "a", "text": "x", "reward": 1}, {"prompt": "a", "rewards": [1]}], "line 2, .*: line 1 has other"),
    ([], "has no rewards in it"),
    ([{"bond_cache": 1}], "has no rewards in it"),
    ([{"bond_cache": 2}], "version 2; this openrlhf-bond reads version 1"),
    ([{"prompt": "a", "rewards": [1]}, {"bond_cache": 1}], "line 2 is not of a reward cache"),
]  # fmt: skip


@pytest.mark.parametrize(("items", "says"), UNREADABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_errors_name_the_file_the_line_and_the_prompt(items: list[Any], says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "broken.jsonl", *items)
    with pytest.raises(ContentError, match=rf"broken\.jsonl.*{says}"):
        read_cache(path)


def test_a_missing_and_a_stopped_file_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="no such file"):
        read_cache(tmp_path / "none.jsonl")
    path = tmp_path / "r.jsonl"
    path.write_text(lines({"bond_cache": 1}, {"prompt": "a", "rewards": [1]}) + '{"prompt": "b", "rewa')
    with pytest.raises(ContentError, match=r"line 3 is unfinished.*Start it again with the same flags"):
        read_cache(path)


def test_the_same_line_twice_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *[{"prompt": "a", "rewards": [1, 2]}] * 2)
    assert read_cache(path).rewards(["a"]).tolist() == [[1, 2]]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    prompt = 'quotes ", line\nbreaks\u2028, \\ and ünicode 😀'
    values = [0.1, 1 / 3, -1e-30, 16777217.0, 3.4028235e38, 5e-46]
    with cache.Writer(path, RECORD) as writer:
        writer.append(prompt, values, ["r"] * 6, label={"answer": 4})
        writer.append("p", [1.0])
        assert writer.cache.rewards([prompt], 6).equal(read_cache(path).rewards([prompt], 6))
        with pytest.raises(ContentError, match="has the prompt 'p' already"):
            writer.append("p", [2.0])
        with pytest.raises(ContentError, match=r"prompt 'q': rewards.1: a reward is nan"):
            writer.append("q", [1.0, math.nan])
    found = read_cache(path)
    assert found.record == {"bond_cache": 1, **RECORD}
    assert [entry.label for entry in found.values()] == ['{"answer": 4}', None]
    assert found.rewards([prompt], 6).tolist() == [torch.tensor(values, dtype=torch.float32).tolist()]
    assert list(found) == [prompt, "p"]
    second = path.read_text(encoding="utf-8").split("\n")[1]
    assert '"rewards": [0.1, 0.33333334,' in second  # for people: the shortest number that is the same in float32


# Writing, being stopped, and going on.


PROMPTS = [(f"prompt {i}", None) for i in range(5)]


def draw(prompts: list[str], chunk: int = 2) -> Iterator[list[PromptSamples]]:
    """A sampler whose samples depend on the prompt alone, as those of the engine do."""
    for start in range(0, len(prompts), chunk):
        yield [
            PromptSamples([1], [[2]] * 3, [f"{prompt} {j}" for j in range(3)], [f"response {j}" for j in range(3)])
            for prompt in prompts[start : start + chunk]
        ]


def score(prompt: str, label: Any, samples: PromptSamples) -> list[float]:
    return [len(prompt) + float(query[-1]) / 3 for query in samples.queries]


Made = Callable[..., bytes]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """``made(path)``: a whole cache, or what is missing of one, by all of ``bond cache`` but the host and vLLM."""
    from bond_plugin.offline import make_cache, scoring

    one = SimpleNamespace
    args = one(
        actor=one(model_name_or_path="m"),
        rollout=one(max_new_tokens=1, temperature=1.0),
        data=one(max_len=9, disable_fast_tokenizer=False),
        vllm=one(tensor_parallel_size=1, num_engines=1),
    )

    def make(
        path: Path, drawn: list[str] | None = None, score: Any = score, samplers: list[Any] | None = None
    ) -> bytes:
        def stream(model: str, prompts: list[str], n: int, chunk: int, **how: Any) -> Iterator[list[PromptSamples]]:
            assert (n, chunk) == (3, 2)
            if drawn is not None:
                drawn.extend(prompts)
            found = draw(prompts)
            if samplers is not None:
                samplers.append(found)
            return found

        args.cache = one(
            output=str(path), samples=3, seed=0, chunk=6, responses=True, log_probs=False, responses_key=None
        )
        monkeypatch.setattr(engine, "stream", stream)
        monkeypatch.setattr(scoring, "scorer", lambda *_: score)
        for name, value in (("tokenizer_of", None), ("training_prompts", PROMPTS), ("record_of", RECORD)):
            monkeypatch.setattr(make_cache, name, lambda *_, value=value: value)
        monkeypatch.setattr(make_cache, "_min_new_tokens", lambda _: 0)
        assert make_cache.make(args) == 0
        return path.read_bytes()

    return make


def test_stopped_anywhere_it_goes_on_without_a_lost_or_doubled_line(made: Made, tmp_path: Path) -> None:
    whole = made(tmp_path / "whole.jsonl")
    assert whole.count(b"\n") == 6
    path = tmp_path / "r.jsonl"
    ends = [place for place, byte in enumerate(whole, start=1) if byte == ord("\n")]
    for length in sorted({*range(0, len(whole), 7), *(end + off for end in ends for off in (-2, -1, 0, 1))}):
        path.write_bytes(whole[:length])
        drawn: list[str] = []
        assert made(path, drawn) == whole, f"stopped after {length} bytes"
        finished = max(0, whole[:length].count(b"\n") - 1)
        # Chunks that are there are not drawn again; one that is there in part is, as a whole.
        assert drawn == [prompt for prompt, _ in PROMPTS[finished - finished % 2 :] if finished < 5]


def test_an_exception_in_the_reward_keeps_what_is_written(made: Made, tmp_path: Path) -> None:
    whole = made(tmp_path / "whole.jsonl")
    path = tmp_path / "r.jsonl"
    samplers: list[Any] = []

    def failing(prompt: str, label: Any, samples: PromptSamples) -> list[float]:
        if prompt == "prompt 3":
            raise RuntimeError("the judge is out")
        return score(prompt, label, samples)

    with pytest.raises(RuntimeError, match="the judge is out"):
        made(path, score=failing, samplers=samplers)
    assert samplers[0].gi_frame is None  # closed, and with it vLLM's process
    assert whole.startswith(path.read_bytes())
    assert list(read_cache(path)) == ["prompt 0", "prompt 1", "prompt 2"]
    assert made(path) == whole


def test_another_record_is_refused_naming_what_differs(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    before = made(path)
    for changes, says in (
        ({"temperature": 0.7}, "--rollout.temperature: 1.0 in the cache, 0.7 in this run"),
        ({"model": {"name": "n", "sha256": "bb"}}, "the initial policy: m, sha256 aa in the cache, n, sha256 bb in"),
        ({"samples": 4}, "--cache.samples: 3 in the file, 4 now"),
        ({"seed": 1}, "--cache.seed: 0 in the file, 1 now"),
    ):
        with pytest.raises(ContentError, match=f"begun with other settings(.|\n)*{says}(.|\n)*another --cache"):
            cache.Writer(path, {**RECORD, **changes})
    assert path.read_bytes() == before
    # A model is itself, whatever its folder is called; without a hash only the name can tell.
    cache.Writer(path, {**RECORD, "model": {"name": "elsewhere", "sha256": "aa"}}).__exit__(None, None, None)
    assert cache.differences(RECORD, {**RECORD, "model": {"name": "m", "sha256": None}}) == []
    assert len(cache.differences(RECORD, {**RECORD, "model": {"name": "n", "sha256": None}})) == 1


def test_a_file_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.jsonl", {"prompt": "a", "rewards": [1]})
    before = path.read_bytes()
    with pytest.raises(ContentError, match="is no file of `bond cache`"):
        cache.Writer(path, RECORD)
    assert path.read_bytes() == before


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    first = cache.Writer(tmp_path / "r.jsonl", RECORD)
    with first, pytest.raises(Busy, match="another process is writing this file"):
        cache.Writer(tmp_path / "r.jsonl", RECORD)
    cache.Writer(tmp_path / "r.jsonl", RECORD).__exit__(None, None, None)


def test_summary_against_brute_force(tmp_path: Path) -> None:
    rows = {"a": [1.0, 1.0, 2.0, 5.0], "b": [3.0, 3.0, 3.0, 3.0]}
    path = write(tmp_path / "r.jsonl", *({"prompt": prompt, "rewards": row} for prompt, row in rows.items()))
    head, *lines = read_cache(path).summary(["a", "b"]).splitlines()
    found = {line[2:17].strip(): line[17:].split()[0] for line in lines}
    pairs = [(x, y) for row in rows.values() for i, x in enumerate(row) for y in row[:i]]
    best = [max(pair) for pair in pairs]
    assert head == "2 prompts x 4 samples"
    assert found == {
        "mean reward": f"{(9 / 4 + 3) / 2:.4f}",
        "Best-of-2": f"{sum(best) / len(best):.4f}",
        "ties": f"{sum(x == y for x, y in pairs) / len(pairs):.1%}",
        "flat prompts": "1",
    }


# What is the same model.


def test_a_models_fingerprint_is_its_content(tiny: Tiny, tmp_path: Path) -> None:
    original = fingerprints.of_model(tiny.model)
    moved = tmp_path / "moved"
    shutil.copytree(tiny.model, moved)
    os.utime(moved / "model.safetensors", (0, 0))
    (moved / "README.md").write_text("notes")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert fingerprints.of_model(moved) == original
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert fingerprints.of_model(moved) not in (original, None)
    shutil.copy(tiny.model / "model.safetensors", moved)
    (moved / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert fingerprints.of_model(moved) not in (original, None)
    (moved / "model.safetensors").unlink()
    assert fingerprints.of_model(moved) is None
    assert fingerprints.of_model("nobody/knows-this") is None


def test_pieces_of_a_large_file_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_WHOLE", 1000)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    content = bytearray(os.urandom(4_000_000))
    seen = set()
    for changed in (None, 0, 1_000_000 - 1, len(content) - 1):
        other = bytearray(content)
        for start in range(0, 0 if changed is None else 40_000):  # a change of one matrix
            other[(changed + start) % len(content)] ^= 1
        weights.write_bytes(other)
        seen.add(fingerprints.of_model(tmp_path))
    weights.write_bytes(content[:-1])
    seen.add(fingerprints.of_model(tmp_path))
    assert len(seen) == 5
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "not-here.safetensors"}}))
    assert fingerprints.of_model(tmp_path) is None


# The host's side: prompts, rewards, checks.


@pytest.fixture
def run(tiny: Tiny, dry: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """``run(flags)``: the host's arguments after every check of ``bond train --dry-run``."""

    def arguments(flags: dict[str, Any] | None = None) -> SimpleNamespace:
        from bond_plugin.host import flags as host_flags

        done = dry({"algo.advantage.estimator": "bond", **(flags or {})})
        assert done.status == 0, done.text
        return host_flags.current().args

    return arguments


def cached(path: Path, args: SimpleNamespace, samples: int = 4, **changes: Any) -> Path:
    """A cache for a run, with made-up rewards."""
    from bond_plugin.offline import make_cache

    tokenizer = tokenizer_of(args)
    record = {**make_cache.record_of(args, tokenizer), "samples": samples, "seed": 0, **changes}
    with cache.Writer(path, record) as writer:
        for i, (prompt, label) in enumerate(training_prompts(args, tokenizer)):
            writer.append(prompt, [i + j / 10 for j in range(samples)], label=label)
    return path


def test_prompts_are_those_of_the_hosts_own_loader(run: Callable, tiny: Tiny, tmp_path: Path) -> None:
    from bond_plugin.offline import make_cache

    args = run({"data.input_template": "Q: {} A:", "data.max_samples": 30})
    found = training_prompts(args, tokenizer_of(args))
    texts = [json.loads(line)["input"] for line in tiny.prompts.read_text().splitlines()[:30]]
    assert found == [(f"Q: {text} A:", "") for text in dict.fromkeys(texts)]  # 26 different ones
    assert len(found) == 26

    chats = tmp_path / "chats.jsonl"
    chats.write_text(lines({"input": [{"role": "user", "content": "hi"}], "answer": 7}))
    args.data.prompt_dataset, args.data.label_key, args.data.input_template = str(chats), "answer", None
    with pytest.raises(DataError, match=r"set --data.apply_chat_template"):
        training_prompts(args, tokenizer_of(args))
    args.data.input_key = "question"
    with pytest.raises(DataError, match=r"no key 'question': set --data.input_key"):
        training_prompts(args, tokenizer_of(args))
    args.data.input_key, args.data.apply_chat_template = "input", True
    tokenizer = tokenizer_of(args)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert training_prompts(args, tokenizer) == [("<hi>", 7)]
    first = make_cache.record_of(args, tokenizer)["template"]
    tokenizer.chat_template += "!"
    assert make_cache.record_of(args, tokenizer)["template"] != first


def test_a_run_takes_a_cache_made_for_it_and_looks_its_rewards_up(run: Callable, dry: Any, tmp_path: Path) -> None:
    from bond_plugin.offline import make_cache

    args = run()
    path = cached(tmp_path / "r.jsonl", args)
    args = run({"bond.reward_cache": path})
    assert args.bond.cache_samples == 4
    prompts = [prompt for prompt, _ in training_prompts(args, tokenizer_of(args))]
    found = make_cache.of(args).rewards([prompts[3], prompts[0]], args.bond.cache_samples)
    assert found.dtype == torch.float64
    assert found.tolist() == [torch.tensor([3 + j / 10 for j in range(4)]).tolist(), torch.arange(4).div(10).tolist()]
    path.unlink()
    assert make_cache.of(args).rewards(prompts[:1]).shape == (1, 4)  # read once
    vbon = {"algo.advantage.estimator": "reinforce", "reward.transform": "vbon", "reward.clip_range": None}
    done = dry({**vbon, "bond.reward_cache": path})
    assert done.status == 2
    assert "no such file. This makes it: bond cache " in done.text
    assert f"--reward.transform vbon --bond.reward_cache {path}\n" in done.text


def test_a_cache_made_otherwise_is_refused_unless_told_to(
    run: Callable, dry: Any, tiny: Tiny, tmp_path: Path
) -> None:
    args = run()
    path = cached(tmp_path / "r.jsonl", args)
    base = {"algo.advantage.estimator": "bond", "bond.reward_cache": path}
    other_reward = tmp_path / "reward.py"
    other_reward.write_text(tiny.reward.read_text() + "\n# changed\n")
    same_reward = tmp_path / "same.py"
    shutil.copy(tiny.reward, same_reward)
    other_model = tmp_path / "model"
    shutil.copytree(tiny.model, other_model)
    assert dry({**base, "reward.remote_url": same_reward, "actor.model_name_or_path": other_model}).status == 0
    content = bytearray((other_model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other_model / "model.safetensors").write_bytes(content)
    for flags, says in (
        ({"rollout.temperature": 0.7}, "--rollout.temperature: 1.0 in the cache, 0.7 in this run"),
        ({"rollout.max_new_tokens": 9}, "--rollout.max_new_tokens: 10 in the cache, 9 in this run"),
        ({"reward.remote_url": other_reward}, "the reward: Python file"),
        ({"reward.remote_url": "http://localhost:1/score"}, "url http://localhost:1/score in this run"),
        ({"actor.model_name_or_path": other_model}, "the initial policy: "),
        ({"data.input_template": "{}!"}, "input_template {}! in this run"),
    ):
        done = dry({**base, **flags})
        assert done.status == 2, done.text
        assert f"--bond.reward_cache {path} was not made for this run" in done.text
        assert says in done.text
        assert "--bond.reward_cache_mismatch warn" in done.text
    done = dry({**base, "rollout.temperature": 0.7, "bond.reward_cache_mismatch": "warn"})
    assert done.status == 0, done.text
    assert "warning: --bond.reward_cache: --rollout.temperature: 1.0 in the cache, 0.7 in this run" in done.out


def test_missing_prompts_too_few_samples_and_nan_stop_before_ray(run: Callable, dry: Any, tmp_path: Path) -> None:
    whole = cached(tmp_path / "whole.jsonl", run({"data.max_samples": 20})).read_text()
    path = tmp_path / "r.jsonl"
    base = {"algo.advantage.estimator": "bond", "bond.reward_cache": path, "data.max_samples": 20}

    path.write_text(whole)
    done = dry({**base, "data.max_samples": 22})
    assert done.status == 2
    assert "has no rewards of the prompt 'knqt' (and of 1 others). This adds what is missing:" in done.text
    assert "--cache.samples=4" in done.text
    done = dry({**base, "bond.cache_samples": 5})
    assert done.status == 2
    assert "line 2: the prompt 'adgj' has 4 samples, 5 are asked for (and 19 other prompts" in done.text
    assert "Use --bond.cache_samples 4, or make another" in done.text
    path.write_text(whole.replace("[1.0,", "[NaN,"))
    done = dry(base)
    assert done.status == 2
    assert "line 3, prompt 'hknq': rewards.0: a reward is nan" in done.text
    # A file of someone else: nothing can be said about how it was made, the prompts are looked up all the same.
    path.write_text("".join(whole.splitlines(keepends=True)[2:]))
    done = dry(base)
    assert done.status == 2
    assert "does not say which model, reward and sampling" in done.text
    assert "has no rewards of the prompt 'adgj'. Make another: bond cache" in done.text
    assert "Traceback" not in done.text


def test_stored_responses_must_be_there(run: Callable, dry: Any, tmp_path: Path) -> None:
    flags = {"algo.advantage.estimator": "squared:Offline", "rollout.n_samples_per_prompt": 4}
    flags |= {"train.batch_size": 64, "data.max_samples": 20}
    done = dry(flags)
    assert done.status == 2
    assert "squared:Offline trains on stored responses: give --bond.reward_cache, with bond cache" in done.text
    path = cached(tmp_path / "r.jsonl", run({"data.max_samples": 20}))
    flags["bond.reward_cache"] = path
    done = dry(flags)
    assert done.status == 2
    assert f"{path} has no tokens and log-probabilities: make it with bond cache --cache.log_probs" in done.text
    record, *items = [json.loads(line) for line in path.read_text().splitlines()]
    for item in items:
        item["tokens"], item["log_probs"] = [[5, 1]] * 4, [[-1.5, -0.5]] * 4
    path.write_text(lines(record, *items))
    assert dry(flags).status == 0
    (stored, *_) = read_cache(path).stored(items[3]["prompt"])
    assert stored == ([5, 1], [-1.5, -0.5], items[3]["rewards"][0])
    done = dry({**flags, "rollout.n_samples_per_prompt": 8, "train.batch_size": 128})
    assert done.status == 2
    assert f"{path} has 4 responses a prompt, and a step takes 8" in done.text
    done = dry({**flags, "train.async_enable": True})
    assert done.status == 2
    assert "--train.async_enable cannot be used with squared:Offline and stored responses" in done.text
    items[2]["log_probs"] = [[-1.5]] * 4
    path.write_text(lines(record, *items))
    done = dry(flags)
    assert done.status == 2
    assert "line 4, prompt" in done.text and "'tokens' and 'log_probs' are of different responses" in done.text


def test_another_label_is_another_reward(run: Callable, dry: Any, tmp_path: Path) -> None:
    data, flags = tmp_path / "labelled.jsonl", {"algo.advantage.estimator": "bond", "data.label_key": "answer"}
    data.write_text(lines(*({"input": "abcd"[: i % 4 + 1], "answer": i % 4} for i in range(16))))
    flags["data.prompt_dataset"] = data
    path = cached(tmp_path / "r.jsonl", run(flags))
    assert dry({**flags, "bond.reward_cache": path}).status == 0
    data.write_text(data.read_text().replace('"answer": 2', '"answer": 20'))
    done = dry({**flags, "bond.reward_cache": path})
    assert done.status == 2
    assert "the label of the prompt 'abc': 2 in the cache, 20 in this run" in done.text


CACHE_REFUSED = [
    ({}, "--cache.output is missing"),
    ({"cache.output": "r.jsonl", "cache.samples": 0}, "--cache.samples must be at least 1, got 0"),
    ({"cache.output": "r.jsonl", "cache.seed": -1}, "--cache.seed must be at least 0, got -1"),
    ({"cache.output": "r.jsonl", "cache.sampels": 3}, "--cache.sampels; did you mean '--cache.samples'?"),
    ({"cache.output": "r.jsonl", "rollout.temperature": 0.0}, "--rollout.temperature must be above 0"),
    ({"cache.output": "r.jsonl", "data.max_len": 10}, "10 leaves no room for a prompt"),
    ({"cache.output": "r.jsonl", "reward.overlong_buffer_len": 2}, "--reward.overlong_buffer_len cannot be used"),
    ({"cache.output": "r.jsonl", "rollout.top_p": 0.9}, "--rollout.top_p cannot be used with bond cache"),
    ({"cache.output": "r.jsonl", "reward.remote_url": "./none.py"}, "--reward.remote_url ./none.py: no such file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "says"), CACHE_REFUSED, ids=lambda value: value if isinstance(value, str) else None
)
def test_bond_cache_refuses_before_sampling(dry: Any, flags: dict[str, Any], says: str) -> None:
    estimator = {"algo.advantage.estimator": "reinforce", "algo.kl.init_coef": 0.0}
    done = dry({**estimator, **flags}, command="cache")
    assert done.status == 2, done.text
    assert says in done.text
    assert "Traceback" not in done.text


def test_bond_cache_takes_a_vbon_run_whose_cache_is_to_be_made(dry: Any, tmp_path: Path) -> None:
    flags = {"algo.advantage.estimator": "reinforce", "reward.transform": "vbon", "algo.kl.init_coef": 0.1}
    flags["reward.clip_range"] = None
    for output in ("cache.output", "bond.reward_cache"):
        done = dry({**flags, "vbon.n": 11, output: tmp_path / "r.jsonl"}, command="cache")
        assert done.status == 0, done.text
        assert f"output: {tmp_path / 'r.jsonl'}" in done.out


def test_cache_help_teaches(dry: Any) -> None:
    done = dry(extra=("--help",), base=False, command="cache")
    assert done.status == 0
    for words in ("--cache.samples", "about 300", "goes on", "--rollout.temperature", "bond cache --recipe"):
        assert words in done.text


@pytest.mark.parametrize("max_new_tokens", [10, None])
@pytest.mark.parametrize("length", [4, 6, 7, 16, 20])
def test_prompts_are_cut_as_the_host_cuts_them(tiny: Tiny, length: int, max_new_tokens: int | None) -> None:
    """The host's executor, with an engine that only notes what it is asked."""
    import asyncio

    from openrlhf.utils import get_tokenizer
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from vllm import SamplingParams

    asked: list[tuple[list[int], int]] = []

    class Engine:
        async def generate(self, ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
            asked.append((ids, params.max_tokens))
            output = SimpleNamespace(token_ids=[5], text="", finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    tokenizer = get_tokenizer(str(tiny.model), None)
    prompt = "abcdefghijklmnopqrstuvwxyz"[:length]
    params = SamplingParams(max_tokens=max_new_tokens)
    asyncio.run(SingleTurnAgentExecutor().execute(prompt, "", params, 16, tokenizer, Engine()))
    assert asked == [engine.prompt_tokens(tokenizer, prompt, max_new_tokens, 16)]


def samples_of(*queries: str) -> PromptSamples:
    return PromptSamples([2], [[3]] * len(queries), list(queries), list(queries))


def test_rewards_of_a_python_file_and_their_errors(tiny: Tiny, tmp_path: Path) -> None:
    from bond_plugin.host.rewards import RewardError
    from bond_plugin.offline import scoring

    assert scoring.remote_score([str(tiny.reward)])("ab", "", samples_of("abab", "abbb<eos>")) == [0.5, 0.0]
    path = tmp_path / "reward.py"
    for body, says in (
        ("raise KeyError('the judge')", r"failed on the prompt 'ab': KeyError\('the judge'\)"),
        ("return {'rewards': [1.0, 2.0]}", "prompt 'ab': rewards must be one finite number.*1.0, 2.0"),
        ("return {'score': [1.0]}", "prompt 'ab': .*one number under 'rewards'.*'score'"),
    ):
        path.write_text(f"def reward_func(queries, prompts, labels):\n    {body}\n")
        with pytest.raises(RewardError, match=says) as caught:
            scoring.remote_score([str(path)])("ab", "", samples_of("abab"))
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(RewardError, match=r"cannot be loaded.*nothing_of_this_name") as caught:
        scoring.scorer(SimpleNamespace(reward=SimpleNamespace(remote_url=[str(path)])), None)
    assert caught.value.__cause__ is not None


def test_rewards_of_a_server_in_the_hosts_format() -> None:
    from bond_plugin.offline import scoring

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        value = len(asked["query"][0]) - len(asked["prompts"][0]) + asked["labels"][0]
        return {"rewards": [value], "scores": [value]}

    with reward_server(answer) as url:
        assert scoring.remote_score([url])("ab", 0.5, samples_of("ab", "abcd")) == [0.5, 2.5]


def test_rewards_of_a_reward_model_do_not_depend_on_padding(run: Callable, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    from bond_plugin.offline import make_cache, scoring

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny.model)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "rm")
    args = run(
        {"reward.remote_url": None, "reward.model_name_or_path": tmp_path / "rm", "rollout.micro_batch_size": 2}
    )
    assert make_cache.record_of(args, tokenizer_of(args))["reward"]["kind"] == "model"
    responses = [[5, 6, 7, 8, 1], [9], [9, 10]]
    samples = PromptSamples([2, 3, 4], responses, [""] * 3, [""] * 3)
    found = scoring.scorer(args, tokenizer_of(args))("", "", samples)
    for ids, reward in zip(responses, found, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([[2, 3, 4, *ids]])).last_hidden_state[0, -1]
        assert reward == pytest.approx(model.score(hidden).item(), abs=0.02)
    assert len(set(found)) == 3


def test_a_failing_reward_stops_with_its_traceback_and_loses_nothing(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of ``bond cache`` but vLLM."""
    from bond_plugin.offline import make_cache

    def stream(
        model: str, prompts: list[str], n: int, *, chunk: int, **settings: Any
    ) -> Iterator[list[PromptSamples]]:
        assert (chunk, settings["seed"], settings["min_new_tokens"], settings["max_len"]) == (2, 5, 0, 32)
        for start in range(0, len(prompts), chunk):
            part = prompts[start : start + chunk]
            yield [
                PromptSamples([2], [[3]] * n, [prompt + "ab"[: j + 1] for j in range(n)], ["."] * n)
                for prompt in part
            ]

    monkeypatch.setattr(engine, "stream", stream)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os\n\n\ndef reward_func(queries, prompts, labels):\n"
        "    if prompts[0] == os.environ.get('BAD'):\n        raise ZeroDivisionError('nothing to divide by')\n"
        "    return {'rewards': [len(queries[0]) if prompts[0] != os.environ.get('NAN') else float('nan')]}\n"
    )
    args = run({"reward.remote_url": reward, "data.max_samples": 5})
    path = tmp_path / "r.jsonl"
    args.cache = SimpleNamespace(
        output=str(path), samples=2, seed=5, responses=False, log_probs=False, chunk=3, responses_key=None
    )

    monkeypatch.setenv("BAD", "hknq")
    assert make_cache.make(args) == 1
    printed = capfd.readouterr().err
    assert "bond cache: error: the reward" in printed
    assert "failed on the prompt 'hknq': ZeroDivisionError('nothing to divide by')" in printed
    assert "raise ZeroDivisionError" in printed[printed.index("Traceback") :]
    assert len(read_cache(path)) == 1
    monkeypatch.delenv("BAD")

    monkeypatch.setenv("NAN", "vybe")
    assert make_cache.make(args) == 1
    printed = capfd.readouterr().err
    assert "failed on the prompt 'vybe': rewards must be one finite number" in printed and "nan" in printed
    monkeypatch.delenv("NAN")
    assert len(read_cache(path)) == 3

    assert make_cache.make(args) == 0
    assert "5 prompts x 2 samples\n  mean reward        5.5000" in capfd.readouterr().out
    assert path.read_text().splitlines()[2] == '{"prompt": "hknq", "rewards": [5.0, 6.0]}'
    assert make_cache.make(args) == 0
    assert "5 prompts are there already" in capfd.readouterr().out
    args.rollout.temperature = 0.5
    assert make_cache.make(args) == 1
    assert "--rollout.temperature: 1.0 in the cache, 0.5 in this run" in capfd.readouterr().err


# All of it, with real vLLM.


@pytest.fixture
def bond_cache(tiny: Tiny, tmp_path: Path) -> Callable[..., list[str]]:
    """``bond_cache(output, **flags)``: the arguments of ``bond`` that make a cache for a BOND run on 26 prompts."""

    def build(output: Path, **flags: Any) -> list[str]:
        wanted = with_flags(recipe_for(tiny), {"algo.advantage.estimator": "bond", **flags})
        wanted |= {"cache.output": output, "cache.samples": 24, "cache.chunk": 48}
        return ["cache", *to_argv(wanted)]

    return build


def ended_at_once(tiny: Tiny, prompts: list[str], samples: int) -> tuple[float, float]:
    """How many responses read as no more than the EOS token: mean and standard deviation by the model itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.model), AutoTokenizer.from_pretrained(tiny.model)
    with torch.no_grad():
        ids = tokenizer(prompts, add_special_tokens=False, return_tensors="pt")["input_ids"]
        first = model(ids).logits[:, -1].float().softmax(dim=-1)
    chance = first[:, 1] + first[:, 29:].sum(dim=-1) / 30  # or after one of the ids that have no letter
    return samples * chance.sum().item(), (samples * (chance * (1 - chance)).sum().item()) ** 0.5


@pytest.mark.e2e
def test_killed_midway_it_ends_with_the_same_file_and_training_takes_it(
    tiny: Tiny, bond_command: Callable[..., Run], bond_cache: Callable[..., list[str]], dry: Any, tmp_path: Path
) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "r.jsonl"
    done = bond_command(tmp_path / "whole", *bond_cache(whole))
    assert "26 prompts x 24 samples" in done.output
    assert "Best-of-8" in done.output
    content = whole.read_bytes()
    assert content.count(b"\n") == 27

    # A slow reward, so that there is a middle; its content is part of the record, so the delay is told outside.
    slow = tmp_path / "reward.py"
    slow.write_text(
        tiny.reward.read_text().replace(
            "rewards = []", 'rewards = []; import os, time; time.sleep(float(os.environ.get("DELAY", 0)))'
        )
    )
    flags = {"reward.remote_url": slow}
    with (tmp_path / "killed.log").open("w") as log:
        command = [sys.executable, "-m", "bond_plugin", *bond_cache(path, **flags)]
        environment = clean_environment(DELAY="0.1", OMP_NUM_THREADS="1")
        killed = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while not path.exists() or path.read_bytes().count(b"\n") < 6:
            assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "killed.log").read_text()[
                -3000:
            ]
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    before = path.read_bytes()
    assert 6 <= before.count(b"\n") < 27
    done = bond_command(tmp_path / "again", *bond_cache(path, **flags))
    assert "prompts are there already" in done.output
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().split(b"\n", 1)[1] == content.split(b"\n", 1)[1]  # but for the reward in the record

    # The samples and their rewards are what they should be.
    sys.path.insert(0, str(tiny.folder))
    try:
        from reward import reward_func
    finally:
        sys.path.remove(str(tiny.folder))
    items = [json.loads(line) for line in content.splitlines()[1:]]
    assert len({tuple(item["responses"]) for item in items}) == 26
    for item in items:
        assert len(item["responses"]) == 24
        assert len(set(item["responses"])) > 12
        queries = [item["prompt"] + response for response in item["responses"]]
        expected = reward_func(queries, [item["prompt"]] * 24, None)["rewards"]
        assert torch.tensor(item["rewards"]).equal(expected)
        for response in item["responses"]:
            assert len(response.replace("<eos>", "").replace("<pad>", "_")) <= 10  # three ids have no letter
            assert "<eos>" not in response.removesuffix("<eos>")
    at_once = sum(response == "<eos>" for item in items for response in item["responses"])
    mean, deviation = ended_at_once(tiny, [item["prompt"] for item in items], 24)
    assert abs(at_once - mean) < 3 * deviation < mean  # no least length, as in the rollouts of BOND

    base = {"algo.advantage.estimator": "bond", "bond.reward_cache": whole}
    assert dry(base).status == 0
    done = dry({**base, "rollout.temperature": 0.9})
    assert done.status == 2
    assert "--rollout.temperature: 1.0 in the cache, 0.9 in this run" in done.text

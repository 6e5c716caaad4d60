"""log P(query | response): its numbers, the reversed data as the host reads them, and a backward model it trained."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LETTERS, REPOSITORY, Run, Tiny, execute, load, recipe_for, to_argv, with_flags

from bond_plugin.rewards import calls, reverse, trlm

RECIPE = REPOSITORY / "recipes" / "rewards" / "trlm.py"
FILE = REPOSITORY / "bond_plugin" / "rewards" / "trlm.py"
TEXTS = ["How are you today?", "The weather is bad, and there is no tea.", "No, thank you.", "Why is there no tea?"]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    trlm._directions.cache_clear()


def alone(model: Any, given: list[int], asked: list[int]) -> float:
    """By the chain rule, a forward pass for each token."""
    total = 0.0
    for i, token in enumerate(asked):
        with torch.no_grad():
            logits = model(torch.tensor([given + asked[:i]])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(dim=-1)).item()
    return total / len(asked)


def test_rows_of_every_length_have_the_numbers_that_each_has_alone(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 29, (count,), generator=generator).tolist()

    rows = [(tokens(given), tokens(asked)) for given, asked in [(1, 1), (40, 3), (1, 30), (7, 7), (20, 2), (3, 25)]]
    wanted = torch.tensor([alone(model, *row) for row in rows])
    torch.testing.assert_close(trlm.mean_log_probs(model, rows), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(trlm.mean_log_probs(model, rows[::-1]), wanted.flip(0), atol=1e-5, rtol=0)
    for i, row in enumerate(rows):
        assert trlm.mean_log_probs(model, [row]).item() == pytest.approx(wanted[i].item(), abs=1e-5)


def test_a_row_that_is_too_long_is_named() -> None:
    short = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8, name_or_path="small"))
    with pytest.raises(ValueError, match="9 tokens, small takes 8"):
        trlm.mean_log_probs(short, [([1] * 5, [2] * 4)])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tokens of several letters, which text read backwards would not have."""
    models = load(REPOSITORY / "recipes" / "miniature" / "models.py")
    folder = tmp_path_factory.mktemp("bpe")
    models.text_tokenizer(folder, TEXTS * 4, 320)
    models.random_model(folder, hidden=32, layers=1, seed=1)
    return folder


@pytest.mark.parametrize("flags", [[], ["--from-scratch"]], ids=["from its weights", "from scratch"])
def test_the_host_reads_the_tokens_that_scoring_asks_for(bpe: Path, tmp_path: Path, flags: list[str]) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bond_plugin.host import cpu

    with cpu.flash_attn_stand_in():
        from openrlhf.datasets.sft_dataset import SFTDataset
    pairs = [(TEXTS[0], TEXTS[2]), (TEXTS[3], TEXTS[1]), (TEXTS[1], "")]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": q, "response": r}) + "\n" for q, r in pairs))
    assert reverse.main([str(bpe), str(data), "--output", str(tmp_path), *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    keys = SimpleNamespace(input_key="response", output_key="query", apply_chat_template=False)
    numbers = AutoTokenizer.from_pretrained(tmp_path / "model")
    read = SFTDataset(
        Dataset.from_list(rows),
        numbers,
        200,
        SimpleNamespace(args=SimpleNamespace(data=keys)),
        "{}",
        num_processors=None,
    )
    words = AutoTokenizer.from_pretrained(bpe)
    for i, (question, response) in enumerate(pairs):
        tokens, _, mask = read[i]
        forward = trlm.ids(words, question) + trlm.ids(words, response)
        assert tokens[0].tolist() == [words.eos_token_id, *forward[::-1], words.eos_token_id]
        assert words.decode(tokens[0, 1:-1].flip(0)) == question + response
        given, asked = trlm.reversed_row(words, question, response)
        assert tokens[0].tolist() == [*given, *asked, words.eos_token_id]
        # The loss is over the query and EOS: the logits before them.
        assert mask[0].nonzero().flatten().tolist() == list(range(len(given) - 1, tokens.shape[1] - 1))
    assert any(trlm.ids(words, text[::-1]) != trlm.ids(words, text)[::-1] for text in TEXTS)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (bpe, tmp_path / "model"))
    equal = torch.equal(before.lm_head.weight.float(), after.lm_head.weight.float())
    assert equal == (not flags)


def test_data_that_cannot_be_reversed(bpe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    assert reverse.main([str(bpe), str(tmp_path / "data.jsonl"), "--output", str(tmp_path)]) == 2
    assert "data.jsonl, line 2: 'prompt' and 'response' must be texts" in capsys.readouterr().err


def reward_of(path: Path) -> Callable[..., Any]:
    """The function as the host loads it."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    return SingleTurnAgentExecutor([str(path)]).reward_func


@pytest.mark.parametrize("path", [RECIPE, FILE], ids=["recipes/", "bond_plugin/"])
def test_all_three_by_path(tiny: Tiny, model: Any, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    texts = [("abc d", "hello<eos>"), ("what now", "  a longer answer is here<eos>")]
    monkeypatch.setenv("BOND_TRLM_PROMPT", "{response} answers ")
    fo = [alone(model, trlm.ids(tokenizer, f"{r[:-5].strip()} answers "), trlm.ids(tokenizer, q)) for q, r in texts]
    ba = [alone(model, *trlm.reversed_row(tokenizer, q, r[:-5].strip())) for q, r in texts]
    settings = {"BOND_TRLM_FORWARD": str(tiny.model), "BOND_TRLM_BACKWARD": str(tiny.model)}
    monkeypatch.setenv("BOND_TRLM_TOKENIZER", str(tiny.model))
    both = [(x + y) / 2 for x, y in zip(fo, ba, strict=True)]
    assert abs(fo[0] - ba[0]) > 0.01
    for names, wanted in ((["BOND_TRLM_FORWARD"], fo), (["BOND_TRLM_BACKWARD"], ba), (list(settings), both)):
        for name, folder in settings.items():
            monkeypatch.setenv(name, folder if name in names else "")
        load_anew = reward_of(path)
        trlm._directions.cache_clear()
        found = load_anew([q + r for q, r in texts], [q for q, _ in texts], ["", ""])
        assert found["rewards"].tolist() == pytest.approx(wanted, abs=1e-5)
        assert found["scores"].tolist() == pytest.approx(torch.tensor(wanted).exp().tolist(), abs=1e-5)


def test_a_question_inside_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "<|im_start|>user\nWhy?\nTell me.<|im_end|>\n<|im_start|>assistant\n"
    assert calls.parts(f"{prompt}So.<|im_end|>", prompt) == ("user\nWhy?\nTell me.\nassistant", "So.")
    monkeypatch.setenv("BOND_REWARD_QUESTION", r"user\n(.*?)<\|im_end\|>")
    assert calls.parts(f"{prompt}So.<|im_end|>", prompt) == ("Why?\nTell me.", "So.")
    with pytest.raises(ValueError, match="no question in the prompt 'else'"):
        calls.parts("else, so", "else")
    monkeypatch.setenv("BOND_REWARD_QUESTION", "user")
    with pytest.raises(ValueError, match="BOND_REWARD_QUESTION must be a regular expression with a group"):
        calls.parts(prompt, prompt)
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        calls.parts("cut", "not cut")


@pytest.mark.parametrize(("settings", "says"), [
    ({}, "BOND_TRLM_FORWARD, BOND_TRLM_BACKWARD or both"),
    ({"BOND_TRLM_BACKWARD": "x"}, "BOND_TRLM_TOKENIZER must be set: the folder of the tokenizer"),
    ({"BOND_TRLM_FORWARD": "x", "BOND_TRLM_PROMPT": "say"}, "BOND_TRLM_PROMPT must have {response} in it, got 'say'"),
])  # fmt: skip
def test_settings(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], says: str) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        trlm.reward_func(["ab"], ["a"], [""])


def test_calls_of_many_threads_are_batched_and_each_gets_its_own() -> None:
    sizes, begin = [], threading.Barrier(16)

    def score(items: list[int]) -> list[int]:
        sizes.append(len(items))
        threading.Event().wait(0.02)
        if 7 in items:
            raise ValueError("seven")
        return [item * item for item in items]

    batches, found = calls.Batches(score, 4), {}

    def ask(i: int) -> None:
        begin.wait()
        try:
            found[i] = batches([i, i + 100])
        except ValueError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.pop(7) == "seven"
    failed = [i for i, value in found.items() if value == "seven"]
    assert len(failed) <= 3
    assert all(found[i] == [i * i, (i + 100) ** 2] for i in found if i not in failed)
    assert calls.Batches(lambda items: items, 4)(range(10)) == list(range(10))
    assert sum(sizes) == 32 and max(sizes) == 4 and len(sizes) < 16


def shifted(text: str) -> str:
    """The response that belongs to a prompt: each letter's next."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in text)


@pytest.mark.e2e
def test_the_host_trains_a_backward_model_and_its_reward_finds_the_response_of_each_query(
    tiny: Tiny, bond_command: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command of docs/rewards.md; then `bond cache` scores with it what this process does."""
    texts = list(dict.fromkeys(json.loads(line)["input"] for line in tiny.prompts.read_text().splitlines()))
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "response": shifted(text)}) + "\n" for text in texts * 40)
    )
    assert reverse.main([str(tiny.model), str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "reversed")]) == 0
    flags = {
        "model.model_name_or_path": tmp_path / "reversed" / "model",
        "data.dataset": tmp_path / "reversed" / "data.jsonl",
        "data.input_key": "response",
        "data.output_key": "query",
        "data.input_template": "{}",
        "data.max_len": 12,
        "train.batch_size": 32,
        "train.micro_batch_size": 32,
        "adam.lr": 5e-3,
        "ds.attn_implementation": "eager",
        "ds.param_dtype": "fp32",
        "ds.zero_stage": 0,
        "ckpt.output_dir": tmp_path / "backward",
    }
    command = [sys.executable, "-m", "bond_plugin.host.run", "openrlhf.cli.train_sft", *to_argv(flags)]
    done = execute(command, tmp_path / "sft", OMP_NUM_THREADS="1", HF_DATASETS_CACHE=str(tmp_path / "datasets"))
    assert done.status == 0, done.said
    settings = {"BOND_TRLM_BACKWARD": str(tmp_path / "backward"), "BOND_TRLM_TOKENIZER": str(tiny.model)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    reward = reward_of(RECIPE)
    found = torch.stack(
        [reward([text + shifted(one) for one in texts], [text] * len(texts), texts)["rewards"] for text in texts]
    )
    own, others = found.diag(), found[~torch.eye(len(texts), dtype=torch.bool)]
    print(f"own {own.mean():.3f}, others {others.mean():.3f}, {len(texts)} texts")
    assert (found.argmax(dim=1) == torch.arange(len(texts))).all()
    assert own.mean() > -0.2 and others.mean() < -2
    cache = {"reward.remote_url": str(RECIPE), "cache.output": str(tmp_path / "cache.jsonl"), "cache.samples": 4,
             "data.max_samples": 8}  # fmt: skip
    vbon = {"algo.advantage.estimator": "reinforce", "reward.transform": "vbon"}
    wanted = with_flags({**recipe_for(tiny), "reward.remote_url": str(RECIPE)}, {**vbon, **cache})
    bond_command(tmp_path / "cache", "cache", *to_argv(wanted), **settings)
    lines = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 8
    for line in lines:
        again = reward([line["prompt"] + text for text in line["responses"]], [line["prompt"]] * 4, [""] * 4)[
            "rewards"
        ]
        assert line["rewards"] == pytest.approx(again.tolist(), abs=1e-4)

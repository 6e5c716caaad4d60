"""``bond evaluate``: its error messages, its estimates against brute force, and all of it with real vLLM."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, clean_environment, moved_model, reward_server

from bond_plugin import recipe
from bond_plugin.bench import figures, two
from bond_plugin.bench.resampling import Estimate
from bond_plugin.bestofn.estimates import expected_max
from bond_plugin.cli import evaluate as command
from bond_plugin.host import metrics as metrics_file
from bond_plugin.offline import engine, likelihood, measure, scoring

PNG = b"\x89PNG\r\n"
EOS = 1


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model with the tokenizer of the first, some way off from it."""
    return moved_model(tiny.model, tmp_path_factory.mktemp("trained") / "model", 7, 0.05)


@pytest.fixture
def prompts(tiny: Tiny, tmp_path: Path) -> Path:
    """Six held-out prompts of different lengths."""
    path = tmp_path / "heldout.jsonl"
    texts = [json.loads(line)["input"] for line in tiny.prompts.read_text().splitlines()[:6]]
    path.write_text("".join(json.dumps({"input": text[: 1 + i % 4]}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def argv(tiny: Tiny, trained: Path, prompts: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A valid command line; keywords replace flags, ``None`` drops one."""

    def build(**changes: Any) -> list[str]:
        flags = {
            "before": tiny.model,
            "after": trained,
            "prompts": prompts,
            "reward": tiny.reward,
            "output_dir": tmp_path / "out",
            **changes,
        }
        return [
            word
            for name, value in flags.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    return build


def no_sampling(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("sampling was started")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def model_without(tiny: Tiny, folder: Path, pattern: str) -> Path:
    shutil.copytree(tiny.model, folder, ignore=shutil.ignore_patterns(pattern))
    return folder


def other_vocabulary(tiny: Tiny, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny.model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(33)
    model.save_pretrained(folder)
    return folder


RAISES = "def reward_func(queries, prompts, labels):\n    raise RuntimeError('the judge is out')\n"
NOT_A_NUMBER = "def reward_func(queries, prompts, labels):\n    return {'rewards': [float('nan')]}\n"
NO_DICT = "def reward_func(queries, prompts, labels):\n    return [1.0]\n"

# Each: what is changed on the command line, given (tiny, folder), and what the message must say.
MISTAKES: dict[str, tuple[Callable[[Tiny, Path], dict[str, Any]], Sequence[str]]] = {
    "no such model": (lambda t, p: {"before": p / "nothing"}, ["--before", "no such folder", "hub"]),
    "not a model": (lambda t, p: {"before": p}, ["--before", "config.json"]),
    "no weights": (
        lambda t, p: {"after": model_without(t, p / "m", "*.safetensors")},
        ["--after", "no weights", "*.safetensors"],
    ),
    "no tokenizer": (
        lambda t, p: {"after": model_without(t, p / "m", "tokenizer*")},
        ["--after", "no tokenizer", "copy"],
    ),
    "other vocabulary": (
        lambda t, p: {"after": other_vocabulary(t, p / "m")},
        ["--after", "33", "32", "trained from"],
    ),
    "no such prompts": (lambda t, p: {"prompts": p / "no.jsonl"}, ["--prompts", "no such file"]),
    "prompts not JSON": (
        lambda t, p: {"prompts": write(p / "x.jsonl", '{"input": "a"}\nhello\n')},
        ["--prompts", "line 2", "not JSON"],
    ),
    "other key": (
        lambda t, p: {"prompts": write(p / "x.jsonl", '{"question": "a"}\n')},
        ["--prompts", "line 1", "'input'", "'question'", "--input-key"],
    ),
    "no label": (lambda t, p: {"label_key": "answer"}, ["--prompts", "'answer'", "--label-key"]),
    "empty prompt": (
        lambda t, p: {"prompts": write(p / "x.jsonl", '{"input": ""}\n')},
        ["--prompts", "line 1", "non-empty"],
    ),
    "no place for the prompt": (lambda t, p: {"input_template": "Q: "}, ["--input-template", "{}"]),
    "chat prompt": (
        lambda t, p: {"prompts": write(p / "x.jsonl", '{"input": [{"role": "user"}]}\n')},
        ["--prompts", "chat template"],
    ),
    "no prompts": (lambda t, p: {"prompts": write(p / "x.jsonl", "\n")}, ["--prompts", "empty", '"input"']),
    "no such reward": (lambda t, p: {"reward": p / "no.py"}, ["--reward", "no such file"]),
    "reward no Python": (lambda t, p: {"reward": write(p / "r.txt", "")}, ["--reward", "Python file"]),
    "reward cannot load": (
        lambda t, p: {"reward": write(p / "r.py", f"1 / 0\n{NOT_A_NUMBER}")},
        ["--reward", "ZeroDivision"],
    ),
    "no reward_func": (lambda t, p: {"reward": write(p / "r.py", "x = 1")}, ["--reward", "reward_func"]),
    "reward raises": (lambda t, p: {"reward": write(p / "r.py", RAISES)}, ["--reward", "the judge is out"]),
    "reward NaN": (lambda t, p: {"reward": write(p / "r.py", NOT_A_NUMBER)}, ["--reward", "nan"]),
    "reward no dict": (lambda t, p: {"reward": write(p / "r.py", NO_DICT)}, ["--reward", "'rewards'"]),
    "no metrics": (lambda t, p: {"metrics": p / "no.jsonl"}, ["--metrics", "no such file"]),
    "metrics empty": (lambda t, p: {"metrics": write(p / "m.jsonl", "{}\n")}, ["--metrics", "step"]),
    "output a file": (lambda t, p: {"output_dir": write(p / "o", "")}, ["--output-dir", "folder"]),
    "no samples": (lambda t, p: {"samples": 0}, ["--samples", "at least 1"]),
    "no tokens": (lambda t, p: {"max_new_tokens": 0}, ["--max-new-tokens", "at least 1"]),
    "too many for KL": (lambda t, p: {"samples": 2, "kl_samples": 3}, ["--kl-samples", "at most", "2"]),
    "cold": (lambda t, p: {"temperature": 0}, ["--temperature", "above 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_anything_is_sampled(
    mistake: str,
    tiny: Tiny,
    argv: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(engine, "sample", no_sampling)
    make, words = MISTAKES[mistake]
    assert command.main(argv(**make(tiny, tmp_path))) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("bond evaluate: error: --")
    for word in words:
        assert word in message


def test_missing_flags_are_argparse_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--before", "x"])
    assert stop.value.code == 2
    assert "--after, --prompts, --reward, --output-dir" in capsys.readouterr().err


def test_importing_the_command_is_cheap() -> None:
    probe = (
        "import sys, bond_plugin.cli.evaluate;"
        "heavy = {'torch', 'vllm', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", probe], env=clean_environment(), check=True)


# KL.


def response_kl(
    model: Path, other: Path, prompts: list[list[int]], responses: list[list[list[int]]], temperature: float = 1.0
) -> torch.Tensor:
    """[prompts, responses of each]"""
    return likelihood.measure(likelihood.load(model, other), prompts, responses, temperature).kl


@functools.cache
def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def next_token_log_probs(path: Path, ids: Sequence[Sequence[int]], temperature: float) -> torch.Tensor:
    """[len(ids), vocabulary]; the token sequences are equally long, so that nothing is padded."""
    with torch.no_grad():
        logits = load(path)(torch.tensor(ids)).logits[:, -1].double()
    return torch.log_softmax(logits / temperature, dim=-1)


def test_kl_of_a_model_from_itself_is_zero(tiny: Tiny) -> None:
    found = response_kl(tiny.model, tiny.model, [[5, 6], [7]], [[[3, 4, EOS]], [[9]]])
    assert found.shape == (2, 1)
    assert found.abs().max().item() < 1e-6


def test_kl_is_the_sum_of_the_exact_next_token_kl(tiny: Tiny, trained: Path) -> None:
    # Prompts and responses of different lengths, so that padding on either side would show.
    prompts = [[5, 6, 7, 8, 9], [10]]
    responses = [[[3, 4, 5, EOS], [6]], [[20, 21, 22, 23, 24, 25], [7, EOS]]]
    temperature = 0.7
    found = response_kl(trained, tiny.model, prompts, responses, temperature)
    for i, j in itertools.product(range(2), range(2)):
        expected = 0.0
        for t in range(len(responses[i][j])):
            ids = prompts[i] + responses[i][j][:t]
            log_p = next_token_log_probs(trained, [ids], temperature)
            log_q = next_token_log_probs(tiny.model, [ids], temperature)
            expected += (log_p.exp() * (log_p - log_q)).sum().item()
        assert expected > 0.05
        assert found[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_log_probs_alone_are_those_beside_kl_and_entropy(tiny: Tiny, trained: Path) -> None:
    models = likelihood.load(trained, tiny.model)
    prompts, responses = [[5, 6, 7], [8]], [[[3, 4, EOS], [9]], [[2], [7, 3, 6, EOS]]]
    whole = likelihood.measure(models, prompts, responses, 0.7)
    alone = likelihood.measure(models, prompts, responses, 0.7, distributions=False)
    assert torch.equal(alone.log_probs, whole.log_probs)
    for one, other in zip(alone.by_token, whole.by_token, strict=True):
        assert all(map(torch.equal, one, other))
    assert whole.kl.amin() > 0 and whole.entropy.amin() > 0
    assert not alone.kl.any() and not alone.entropy.any()


def test_kl_does_not_depend_on_the_batch_with_absolute_positions(tmp_path: Path) -> None:
    # Rotary positions would not notice the padding on the left; GPT-2's do.
    from transformers import GPT2Config, GPT2LMHeadModel

    folders = [tmp_path / "a", tmp_path / "b"]
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2, initializer_range=0.5, eos_token_id=1
    )
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
    prompts, responses = [[5, 6, 7, 8, 9], [10]], [[[3, 4, 5]], [[6, 7, 8, 9]]]
    together = response_kl(*folders, prompts, responses)
    alone = [response_kl(*folders, [p], [r]).item() for p, r in zip(prompts, responses, strict=True)]
    assert together.flatten().tolist() == pytest.approx(alone, rel=1e-4)
    assert min(alone) > 0.1


def test_kl_has_the_mean_of_the_log_ratio(tiny: Tiny, trained: Path) -> None:
    # Over all responses of two tokens, weighted by their probability: E[estimate] = E[log p(y) - log q(y)].
    prompt, vocabulary = [5, 6, 7], 32
    continued = [[*prompt, token] for token in range(vocabulary)]
    firsts = [next_token_log_probs(path, [prompt], 1.0)[0] for path in (trained, tiny.model)]
    seconds = [next_token_log_probs(path, continued, 1.0) for path in (trained, tiny.model)]
    log_p, log_q = (first[:, None] + second for first, second in zip(firsts, seconds, strict=True))
    responses = [list(pair) for pair in itertools.product(range(vocabulary), repeat=2)]
    found = response_kl(trained, tiny.model, [prompt], [responses])[0].reshape(vocabulary, vocabulary)
    expected = (log_p.exp() * (log_p - log_q)).sum().item()
    assert (log_p.exp() * found).sum().item() == pytest.approx(expected, rel=1e-4)


# Rewards, caching and the numbers of the report, on samples that are made up.


def test_rewards_come_in_order_from_calls_with_one_query(tmp_path: Path) -> None:
    path = write(
        tmp_path / "reward.py",
        "def reward_func(queries, prompts, labels):\n"
        "    assert len(queries) == len(prompts) == len(labels) == 1\n"
        "    return {'rewards': [len(queries[0]) + 10 * labels[0]]}\n",
    )
    drawn = [engine.PromptSamples([], [[]] * 8, ["a" * (j % 5) for j in range(8)], []) for _ in range(5)]
    found = scoring.rewards(scoring.remote_score([str(path)]), [("p", i) for i in range(5)], drawn)
    assert found.tolist() == [[j % 5 + 10 * i for j in range(8)] for i in range(5)]


class FakeEngine:
    """Stands in for vLLM: the trained policy answers with vowels more often."""

    def __init__(self, trained: Path) -> None:
        self.trained = trained
        self.calls: list[tuple[str, int]] = []

    def __call__(
        self, model: Path, prompts: Sequence[str], n: int, *, seed: int, **settings: Any
    ) -> list[engine.PromptSamples]:
        self.calls.append((str(model), seed))
        first = 1 if model == self.trained else 0
        drawn = []
        for i, prompt in enumerate(prompts):
            texts = [("e" if (i + j + first) % 3 else "x") * (j % 4 + 1) for j in range(n)]
            ids = [[6] * len(text) for text in texts]
            drawn.append(engine.PromptSamples([5] * len(prompt), ids, [prompt + text for text in texts], texts))
        return drawn


@pytest.fixture
def fake(trained: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    made = FakeEngine(trained)
    monkeypatch.setattr(engine, "sample", made)
    return made


def evaluated(
    before: Path, after: Path, reward: Path, output_dir: Path, prompts: Sequence[str] = ("ab", "cd"), **sampling: Any
) -> dict[str, Any]:
    args = recipe.namespace(command._Run().model_dump())
    args.reward.remote_url = [str(reward)]
    args.rollout.max_new_tokens, args.rollout.temperature = 32, 1.0
    pairs, score = [(prompt, "") for prompt in prompts], scoring.scorer(args, None)
    how = {"samples": 8, "kl_samples": 2, "seed": 0, "engines": None, **sampling}
    flags = argparse.Namespace(before=before, after=after, output_dir=output_dir, **how)
    return two.Evaluation(flags, pairs, score, args, lambda message: None).run()


def test_report_is_made_of_means_over_prompts(tiny: Tiny, trained: Path, fake: FakeEngine, tmp_path: Path) -> None:
    result = evaluated(tiny.model, trained, tiny.reward, tmp_path, ["ab", "cd", "ef"])
    before, after = (
        torch.tensor([[float((i + j + first) % 3 != 0) for j in range(8)] for i in range(3)]) for first in (0, 1)
    )
    assert result["reward_before"].value == pytest.approx(before.mean().item())
    assert result["reward_after"].value == pytest.approx(after.mean().item())
    assert result["gain"].value == pytest.approx((after - before).mean().item())
    gains = (after - before).mean(dim=1)
    gain = result["gain"]
    assert gains.min() - 1e-9 <= gain.low <= gain.value <= gain.high <= gains.max() + 1e-9
    pairs = (after[:, :, None] - before[:, None, :]).sign()
    assert result["win_rate"].value == pytest.approx(((pairs + 1) / 2).mean().item())
    assert list(result["best_of"]) == [2, 4, 8]
    assert result["best_of"][4].value == pytest.approx(expected_max(before, 4).mean().item())
    assert result["length_before"] == 2.5
    assert [seed for _, seed in fake.calls] == [0, 1]
    shown = json.loads(two.to_json(result))
    assert shown["best_of"]["2"]["mean"] == pytest.approx(result["best_of"][2].value)
    assert shown["examples"][0]["before"].startswith("ab")


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a reward server that counts letters."""

    with reward_server(lambda asked: {"rewards": [len(query) for query in asked["query"]]}) as address:
        yield address


def test_a_reward_server_scores_as_in_training(
    server: str, argv: Callable[..., list[str]], fake: FakeEngine, tmp_path: Path
) -> None:
    assert command.main(argv(reward=server, samples=4, kl_samples=1)) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    prompts = [json.loads(line)["input"] for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    expected = sum(map(len, prompts)) / len(prompts) + 2.5  # responses have 1 to 4 letters
    assert found["reward_before"]["mean"] == found["reward_after"]["mean"] == pytest.approx(expected)


def test_a_reward_model_scores_as_in_training(
    tiny: Tiny, argv: Callable[..., list[str]], fake: FakeEngine, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny.model)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "rm")
    assert command.main(argv(reward=tmp_path / "rm", samples=4, kl_samples=1)) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    prompts = [json.loads(line)["input"] for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    expected = []
    for prompt in prompts:
        for count in range(1, 5):
            with torch.no_grad():
                hidden = model.model(torch.tensor([[5] * len(prompt) + [6] * count])).last_hidden_state[0, -1]
            expected.append(model.score(hidden).item())
    assert max(expected) - min(expected) > 0.05
    assert found["reward_before"]["mean"] == pytest.approx(sum(expected) / len(expected), abs=0.01)


def test_different_tokenizers_are_refused(
    tiny: Tiny, trained: Path, fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(model: Path, *args: Any, **settings: Any) -> list[engine.PromptSamples]:
        return [replace(one, prompt_ids=[len(str(model))]) for one in fake(model, *args, **settings)]

    monkeypatch.setattr(engine, "sample", sample)
    with pytest.raises(measure.TokenizerError, match="tokenize the prompts differently"):
        evaluated(tiny.model, trained, tiny.reward, tmp_path, samples=2)


def test_samples_and_rewards_are_reused_until_something_changes(
    tiny: Tiny, trained: Path, fake: FakeEngine, tmp_path: Path
) -> None:
    counts = tmp_path / "calls"
    reward = tmp_path / "reward.py"
    source = tiny.reward.read_text().replace(
        "    rewards = []\n", f"    open({str(counts)!r}, 'a').write('x')\n    rewards = []\n"
    )
    model = tmp_path / "copy"
    shutil.copytree(trained, model)
    reward.write_text(source)

    def run(**settings: Any) -> tuple[int, int, dict[str, Any]]:
        fake.calls.clear()
        counts.write_text("")
        result = evaluated(tiny.model, model, reward, tmp_path / "cache", **settings)
        return len(fake.calls), len(counts.read_text()), result

    sampled, scored, first = run()
    assert (sampled, scored) == (2, 32)
    sampled, scored, again = run()
    assert sampled == 0
    assert scored == 8  # the spot checks
    assert again == first
    reward.write_text(source + "# edited\n")
    assert run()[:2] == (0, 32)
    assert run(seed=5)[:2] == (2, 32)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert run()[0] == 1
    # A classifier behind the same file: the spot checks notice.
    state = write(tmp_path / "state", "0")
    shifted = f"torch.tensor(rewards) + float(open({str(state)!r}).read())"
    reward.write_text(source.replace("torch.tensor(rewards)", shifted))
    before = run()[2]
    state.write_text("1")
    sampled, scored, after = run()
    assert sampled == 0
    assert after["reward_before"].value == pytest.approx(before["reward_before"].value + 1)


# The picture and the table.


def estimate(mean: float) -> Estimate:
    return Estimate(mean, mean - 0.25, mean + 0.25)


def made_up(after: float) -> dict[str, Any]:
    return {
        "before": "a",
        "after": "b",
        "prompts": 64,
        "reward_before": estimate(-123.456),
        "reward_after": estimate(after),
        "gain": estimate(after),
        "win_rate": estimate(0.7),
        "kl": estimate(3.5),
        "best_of": {2: estimate(0.6), 4: estimate(1.2), 8: estimate(1.6), 16: estimate(2.0)},
        "length_before": 31.5,
        "length_after": 30.25,
        "examples": [],
        "samples": 16,
        "max_new_tokens": 32,
        "temperature": 1.0,
    }


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (0.1, "No difference"),
        (0.5, "one sample and Best-of-2"),
        (1.7, "between Best-of-8 and Best-of-16"),
        (2.5, "more than Best-of-16"),
        (-1.0, "less"),
    ],
)
def test_table_fits_a_terminal_and_says_where_the_policy_stands(after: float, says: str) -> None:
    table = two.format_table(made_up(after))
    assert max(map(len, table.splitlines())) <= 80
    assert says in table.splitlines()[-1]
    for words in (
        "initial policy",
        "its Best-of-16",
        "-123.456",
        "3.50 [3.25, 3.75]",
        "31.5",
        "win rate",
        "0.19",
    ):
        assert words in table


@pytest.mark.parametrize("after", [1.0, -200.0])
def test_curves_are_drawn_from_what_is_logged(after: float, tmp_path: Path) -> None:
    lines = [{"step": s, "reward/policy": s / 10, "bond/kl_ref": None if s == 3 else 0.1 * s} for s in range(1, 30)]
    path = write(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "r')
    read = metrics_file.read(path)
    assert [line["step"] for line in read] == list(range(1, 30))
    figure = figures.run_curves(read, made_up(after))
    reward, kl, quantile = figure.axes
    assert [len(line.get_xdata()) for line in reward.lines[:2]] == [29, 29]
    assert [len(line.get_xdata()) for line in kl.lines] == [28, 28]
    assert not quantile.lines and "not logged" in quantile.texts[0].get_text()
    assert f"after {after:.2f}" in {text.get_text() for text in reward.texts}
    assert figures.png(figure).startswith(PNG)


# Real vLLM.


@pytest.mark.parametrize(
    ("child", "says"),
    [
        (
            r"""printf '%s\n' '{"error": "Traceback\nValueError: no room"}'; echo noise >&2; exit 1""",
            "ValueError: no room",
        ),
        ("echo 'out of memory' >&2; kill -9 $$", "out of memory"),
    ],
)
def test_sampling_errors_carry_the_reason(
    child: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = write(tmp_path / "python", f"#!/bin/sh\n{child}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(engine.SamplingError, match=f"sampling from somewhere failed(.|\n)*{says}$"):
        engine.sample("somewhere", ["a"], 1, max_new_tokens=1, temperature=1.0, seed=0)


@pytest.mark.parametrize("folder", [True, False])
def test_the_hub_is_asked_for_names_only(folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = write(tmp_path / "python", '#!/bin/sh\necho "offline=$HF_HUB_OFFLINE." >&2\nexit 1\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(engine.SamplingError, match=f"offline={1 if folder else ''}[.]"):
        model = tmp_path if folder else "owner/name"
        engine.sample(model, ["a"], 1, max_new_tokens=1, temperature=1.0, seed=0)


@pytest.mark.e2e
def test_whole_command_with_vllm_and_again_from_its_cache(
    tiny: Tiny,
    trained: Path,
    argv: Callable[..., list[str]],
    forks: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in list(os.environ):
        if name not in clean_environment():
            monkeypatch.delenv(name)
    for name, value in forks.items():
        monkeypatch.setenv(name, value)
    metrics = write(tmp_path / "metrics.jsonl", '{"step": 1, "reward/policy": 0.2}\n')
    flags = {"samples": 64, "kl_samples": 64, "max_new_tokens": 8, "metrics": metrics}
    assert command.main(argv(**flags)) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    result = json.loads((out / "evaluation.json").read_text())
    assert (out / "curves.png").read_bytes().startswith(PNG)
    assert f"{result['reward_after']['mean']:.3f}" in printed
    assert result["gain"]["mean"] == pytest.approx(result["reward_after"]["mean"] - result["reward_before"]["mean"])

    (path,) = (out / "cache").glob("samples-after-*.json")
    drawn, _ = measure.read_samples(path)
    prompts = [json.loads(line)["input"] for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    for prompt, one in zip(prompts, drawn, strict=True):
        assert len(one.queries) == 64
        assert len(set(one.queries)) > 32
        assert all(query.startswith(prompt) for query in one.queries)
        assert all(len(ids) == 8 or (ids[-1] == EOS and len(ids) < 8) for ids in one.response_ids)
        assert all(EOS not in ids[:-1] for ids in one.response_ids)
    assert any(query.endswith("<eos>") for one in drawn for query in one.queries)

    # vLLM samples from the distribution whose KL is computed: the mean log-ratio of its samples is that KL.
    exact = response_kl(trained, tiny.model, [one.prompt_ids for one in drawn], [one.response_ids for one in drawn])
    ratio = torch.tensor(
        [log_ratio(trained, tiny.model, one.prompt_ids, ids) for one in drawn for ids in one.response_ids[:16]]
    )
    assert result["kl"]["mean"] == pytest.approx(exact.mean().item())
    assert abs(ratio.mean() - exact.mean()) < 4 * ratio.std() / len(ratio) ** 0.5

    monkeypatch.setattr(engine, "sample", no_sampling)
    assert command.main(argv(**flags)) == 0
    assert capsys.readouterr().out.count("reused") == 4
    assert json.loads((out / "evaluation.json").read_text()) == result


def log_ratio(model: Path, other: Path, prompt: list[int], response: list[int]) -> float:
    """log p(response) - log q(response), each in one unpadded forward pass."""
    totals = []
    for path in (model, other):
        with torch.no_grad():
            logits = load(path)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        totals.append(torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(response)[:, None]).sum().item())
    return totals[0] - totals[1]

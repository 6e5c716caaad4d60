"""Prompts are the same tokens wherever a model meets them: in training, `bond cache`, `evaluate` and `bench`."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import POOLED, Tiny, moved_model

from bond_plugin.bench import measure as bench_measure
from bond_plugin.cli import evaluate as command
from bond_plugin.host.metrics import MetricsFile
from bond_plugin.offline import engine, make_cache

CHAT = "{% for m in messages %}u {{ m.content }} e{% endfor %}{% if add_generation_prompt %} a {% endif %}"
CONVERSATION = [{"role": "user", "content": "hello there"}, {"role": "user", "content": "and again"}]


class Sampled(Exception):
    """Raised instead of sampling."""


@pytest.fixture(scope="module")
def chat(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny.model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moved_model(chat, tmp_path_factory.mktemp("trained") / "model", 7, 0.05)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """What the sampling engine is asked for, by whichever of its functions; nothing is sampled."""
    found: list[tuple[list[str], dict[str, Any]]] = []

    def note(model: str, prompts: list[str], n: int, **settings: Any) -> Any:
        found.append((list(prompts), settings))
        raise Sampled

    monkeypatch.setattr(engine, "sample", note)
    monkeypatch.setattr(engine, "stream", note)
    return found


def trained_on(args: SimpleNamespace, tokenizer: Any) -> list[list[int]]:
    """The prompts' tokens that the host's own rollouts give to vLLM, by its dataset and its executor."""
    from openrlhf.trainer.ppo_trainer import prepare_datasets
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    from vllm import SamplingParams

    found: list[list[int]] = []

    class Engine:
        async def generate(self, ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
            found.append(ids)
            output = SimpleNamespace(token_ids=[5], text="", finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    strategy = SimpleNamespace(
        args=args,
        print=lambda *words: None,
        is_rank_0=lambda: False,
        setup_dataloader=lambda dataset, *rest, **more: dataset,
    )
    for prompt in prepare_datasets(strategy, tokenizer)[0].prompts:
        params = SamplingParams(max_tokens=args.rollout.max_new_tokens)
        executor = SingleTurnAgentExecutor()
        asyncio.run(executor.execute(prompt, "", params, args.data.max_len, tokenizer, Engine()))
    return found


def configuration(args: Any) -> Any:
    return json.loads(json.dumps(args, default=lambda v: vars(v) if isinstance(v, SimpleNamespace) else str(v)))


WAYS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "chat": ({"data.apply_chat_template": True}, ["abc", CONVERSATION, "a much longer prompt than fits"]),
    "template": ({"data.input_template": "q {} a "}, ["abc", "a much longer prompt than fits into it"]),
    "as they are": ({}, ["abc", "a much longer prompt than fits into the room that there is"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_prompts_are_the_same_tokens_in_training_cache_evaluate_and_bench(
    way: str,
    tiny: Tiny,
    chat: Path,
    trained: Path,
    asked: list,
    dry: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from openrlhf.utils import get_tokenizer

    from bond_plugin.host import flags

    given, texts = WAYS[way]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input": text}) + "\n" for text in texts if isinstance(text, str)))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps({"input": text}) + "\n" for text in texts))
    base = {"algo.advantage.estimator": "bond", "actor.model_name_or_path": chat, "data.prompt_dataset": data}
    done = dry({**base, **given})
    assert done.status == 0, done.text
    args, tokenizer = flags.current().args, get_tokenizer(str(chat), None)
    wanted = trained_on(args, tokenizer)
    assert any(len(ids) == args.data.max_len - args.rollout.max_new_tokens for ids in wanted)  # one was cut

    def tokens(place: int) -> list[list[int]]:
        prompts, settings = asked[place]
        room = settings["max_new_tokens"], settings["max_len"]
        return [engine.prompt_tokens(tokenizer, prompt, *room)[0] for prompt in prompts]

    args.cache = SimpleNamespace(
        output=str(tmp_path / "r.jsonl"),
        samples=2,
        seed=0,
        responses=False,
        log_probs=False,
        chunk=0,
        responses_key=None,
    )
    with pytest.raises(Sampled):
        make_cache.make(args)
    rows = [{"input": text, "label": ""} for text in texts if isinstance(text, str)]
    settings = {"seed": 1, "reference_samples": 2, "samples": 2}
    job = SimpleNamespace(model=None, rows=rows, configuration=configuration(args), evaluation=settings)
    with pytest.raises(Sampled):
        bench_measure.run(job)
    assert asked[1][1]["seed"] == 2  # the reference's own
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    args.ckpt.output_dir = str(run)
    MetricsFile(args).resume(0)  # as the first step of the training does
    evaluate = [
        "--before", str(chat), "--after", str(run), "--prompts", str(data), "--reward", str(tiny.reward),
        "--max-new-tokens", str(args.rollout.max_new_tokens), "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    with pytest.raises(Sampled):
        command.main(evaluate)
    assert len(asked) == 3
    for place in range(3):
        assert tokens(place) == wanted

    # Without the run's configuration the flags say it.
    (run / "run.json").unlink()
    if way == "chat":
        evaluate += ["--apply-chat-template"]
        evaluate[evaluate.index(str(data))] = str(mixed)
    elif way == "template":
        evaluate += ["--input-template", given["data.input_template"]]
    with pytest.raises(Sampled):
        command.main(evaluate)
    prompts, settings = asked[3]
    assert settings["max_len"] is None
    cut = args.data.max_len - args.rollout.max_new_tokens
    found = [engine.prompt_tokens(tokenizer, prompt, 1, None)[0] for prompt in prompts]
    if way == "chat":
        assert prompts.pop(1) == "u hello there eu and again e a "
        found.pop(1)
    assert [ids[-cut:] for ids in found] == wanted


def test_another_template_than_that_of_the_training_is_refused(
    tiny: Tiny, chat: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "run.json").write_text(json.dumps({"data": {"apply_chat_template": True, "max_len": 40}}))
    prompts = tmp_path / "held.jsonl"
    prompts.write_text('{"input": "abc"}\n')
    flags = [
        "--before", str(chat), "--after", str(run), "--prompts", str(prompts), "--reward", str(tiny.reward),
        "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    for more, says in (
        (["--no-apply-chat-template"], "was trained with True"),
        (["--input-template", "q {}"], "was trained with None"),
        (["--max-new-tokens", "40"], "below the training's --data.max_len = 40"),
    ):
        assert command.main([*flags, *more]) == 2
        assert says in capsys.readouterr().err
    # A model without a template of its own.
    flags[1] = str(tiny.model)
    assert command.main(flags) == 2
    assert "does not fit the tokenizer's chat template (roles: user)" in capsys.readouterr().err


@pytest.mark.parametrize("estimator", ["reinforce", "jbond"])
def test_the_order_of_prompts_is_that_of_train_seed_and_a_resumed_run_goes_on_with_it(
    estimator: str, tiny: Tiny, dry: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two episodes, by the host's sampler; the host's own generator is another one in every run."""
    from openrlhf.trainer.ppo_utils import samples_generator

    from bond_plugin.host import cpu, flags

    with cpu.flash_attn_stand_in():
        from openrlhf.utils.deepspeed.deepspeed import DeepspeedStrategy

    def generate(self: Any, dataloader_iter: Any, num_prompts: int, **_: Any) -> tuple[list[Any], int, bool]:
        prompts, _, _, ended = samples_generator._collect_prompt_batch(dataloader_iter, num_prompts)
        drawn = [SimpleNamespace(prompts=[text], action_mask=torch.ones(1)) for text in prompts]
        return [sample for sample in drawn for _ in range(4)], len(prompts), ended

    monkeypatch.setattr(samples_generator.SamplesGenerator, "_generate_vllm", generate)

    anchor = 0 if estimator == "jbond" else None

    def sampler(seed: int, resumed: dict[str, Any] | None = None) -> Any:
        done = dry(
            {**POOLED, "bond.n_anchor_samples": anchor, "algo.advantage.estimator": estimator, "train.seed": seed}
        )
        assert done.status == 0, done.text
        rows = [(str(i), f"prompt {i}", "", None) for i in range(64)]
        loader = DeepspeedStrategy.setup_dataloader(
            None, rows, 1, collate_fn=lambda batch: list(zip(*batch, strict=True))
        )
        if resumed is not None:
            loader.load_state_dict(resumed)
        strategy = SimpleNamespace(args=flags.current().args)
        return samples_generator.SamplesGenerator(strategy, loader, None, None, [])

    def rollouts(of: Any, count: int) -> list[list[str]]:
        return [[sample.prompts[0] for sample in of.generate_samples()[0]] for _ in range(count)]

    whole = sampler(3)
    seen = rollouts(whole, 3)
    state = whole.prompts_dataloader.state_dict()
    seen += rollouts(whole, 7)
    assert rollouts(sampler(3), 10) == seen
    assert rollouts(sampler(4), 10) != seen
    assert rollouts(sampler(5, state), 7) == seen[3:]

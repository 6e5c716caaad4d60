"""``bond evaluate``: compare a trained policy with its initial policy on held-out prompts.

Everything that can be wrong with the inputs is looked at first, since sampling takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin import recipe
from bond_plugin.files import read_json, write_whole

_DESCRIPTION = """\
Sample two models on the same held-out prompts, score the samples with the reward of the training, and report

  reward      of both models, and the gain prompt by prompt
  Best-of-N   of the initial policy (N = 2, 4, 8, 16): what distillation aims at with a single sample
  win rate    of the trained policy's samples against the initial policy's, ties counting one half
  KL          of the trained policy from the initial one, in nats a response

each with a 95 % bootstrap interval over the prompts.
"""

_EPILOG = """\
Written to --output-dir: evaluation.json (the numbers and a few samples), curves.png (with --metrics), and
cache/ (samples and rewards). The same command started again reuses the cache, so that a run that was
stopped goes on where it was; other models or settings make new entries.

example:
  bond evaluate --before demo/model --after runs/demo/policy --prompts demo/heldout.jsonl \\
    --reward recipes/reviews/reward.py --metrics runs/demo/metrics.jsonl --output-dir runs/demo/evaluation
"""

#: What the host's code asks of a run's arguments, where the trained folder does not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {
        "apply_chat_template": False,
        "input_template": None,
        "disable_fast_tokenizer": False,
        "max_len": None,
    },
    "reward": {"normalize_enable": False},
    "ds": {
        "attn_implementation": "sdpa",
        "experts_implementation": None,
        "param_dtype": "bf16",
        "load_in_4bit": False,
        "value_head_prefix": "score",
    },
    "rollout": {"micro_batch_size": 8},
    "vllm": {"tensor_parallel_size": 1},
}


class InputError(ValueError):
    """A flag's value cannot be used. The message names the flag and what to do."""


def main(argv: list[str]) -> int:
    """Evaluate. Returns the exit status: 2 for unusable inputs, 1 if sampling, reward or models fail."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; never look for them anywhere else
    try:
        metrics = check(args)
        run = arguments(args)
        pairs, score = inputs(args, run)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (InputError, OSError) as error:
        print(f"bond evaluate: error: {error}", file=sys.stderr)
        return 2

    from bond_plugin.bench import two
    from bond_plugin.host.rewards import RewardError
    from bond_plugin.offline import engine, likelihood, measure, scoring

    sampling = two.Sampling(
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        kl_samples=args.kl_samples,
        seed=args.seed,
        max_len=run.data.max_len,
    )
    cache, say = args.output_dir / "cache", _say_from(time.monotonic())
    try:
        evaluation = two.Evaluation(pairs, score, scoring.identity(run), sampling, cache, say)
        result = evaluation.of(args.before, args.after)
    except (engine.SamplingError, RewardError, likelihood.VocabularyError, measure.TokenizerError) as error:
        print(f"bond evaluate: error: {error}", file=sys.stderr)
        return 1
    written = [args.output_dir / "evaluation.json"]
    write_whole(written[0], result.to_json() + "\n")
    if metrics is not None:
        from bond_plugin.bench import figures

        written.append(args.output_dir / "curves.png")
        write_whole(written[1], figures.png(figures.run_curves(metrics, result)))
    print(f"\n{two.format_table(result)}\n")
    print(f"written: {', '.join(map(str, written))}", flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="bond evaluate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(group: Any, flag: str, metavar: str | None, text: str, **more: Any) -> None:
        group.add_argument(flag, metavar=metavar, help=text, **more)

    models = parser.add_argument_group("what to compare")
    add(models, "--before", "DIR", "initial policy: weights and tokenizer", type=Path, required=True)
    add(models, "--after", "DIR", "trained policy, with the same tokenizer", type=Path, required=True)
    add(models, "--prompts", "FILE.jsonl", "held-out prompts, a JSON object a line", type=Path, required=True)
    add(models, "--input-key", "KEY", "the key that holds the prompt (default %(default)s)", default="input")
    add(models, "--label-key", "KEY", "the key that holds the label for the reward (default none)")
    add(
        models,
        "--apply-chat-template",
        None,
        "put the prompts into the tokenizer's chat template, as --data.apply_chat_template does in training "
        "(default: what the training did, if --after has its run.json, else no)",
        action=argparse.BooleanOptionalAction,
    )
    add(
        models,
        "--input-template",
        "TEXT",
        "put each prompt in the place of {}, as --data.input_template does in training (default: likewise)",
    )
    add(
        models,
        "--reward",
        "REWARD",
        "a file with reward_func(queries, prompts, labels), a server's address or several with commas, or a reward "
        "model's folder: what --reward.remote_url or --reward.model_name_or_path is in training",
        required=True,
    )
    sampling = parser.add_argument_group("sampling")
    for flag, metavar, default, text in (
        ("--samples", "K", 16, "samples a prompt from each model; Best-of-N is reported for N up to K"),
        ("--max-new-tokens", "T", 32, "where responses are cut off; use the value of the training"),
        ("--kl-samples", "S", 2, "samples a prompt on which the KL is computed, at most K"),
        ("--seed", "SEED", 0, "of the sampling"),
    ):
        add(sampling, flag, metavar, f"{text} (default %(default)s)", type=int, default=default)
    add(sampling, "--temperature", None, "of the sampling (default %(default)s)", type=float, default=1.0)
    output = parser.add_argument_group("output")
    add(output, "--metrics", "FILE.jsonl", "metrics.jsonl of the run: also draw curves.png", type=Path)
    add(output, "--output-dir", "DIR", "made if missing", type=Path, required=True)
    return parser


def check(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Look at all that needs neither models nor the host. Returns the metrics, if there are to be curves.

    Raises:
        InputError: the first problem found.
    """
    for flag, value, least in (
        ("--samples", args.samples, 1),
        ("--max-new-tokens", args.max_new_tokens, 1),
        ("--kl-samples", args.kl_samples, 1),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            raise InputError(f"{flag} must be at least {least}, got {value}")
    if args.kl_samples > args.samples:
        raise InputError(f"--kl-samples must be at most --samples = {args.samples}, got {args.kl_samples}")
    if not 0 < args.temperature < float("inf"):
        raise InputError(f"--temperature must be above 0, got {args.temperature}")
    if args.input_template is not None and "{}" not in args.input_template:
        raise InputError(f"--input-template needs {{}} where the prompt goes, got {args.input_template!r}")
    sizes = [_vocabulary("--before", args.before), _vocabulary("--after", args.after)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"--after {args.after} has a vocabulary of {sizes[1]} tokens and --before one of {sizes[0]}: "
            "give the model that --after was trained from"
        )
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise InputError(f"--output-dir {args.output_dir} is a file: name a folder")
    if args.metrics is None:
        return None
    from bond_plugin.host import metrics

    try:
        return metrics.read(args.metrics)
    except ValueError as error:
        raise InputError(f"--metrics {error}. It is the file in the run's output folder") from error


def arguments(args: argparse.Namespace) -> SimpleNamespace:
    """The host's arguments, as far as prompts and reward need them: the training's, where --after has them.

    Raises:
        InputError: what is not as in the training, or a reward that is nowhere.
    """
    from bond_plugin.offline.prompts import CONFIGURATION

    trained = read_json(args.after / CONFIGURATION) or {}
    found = {name: {**group, **trained.get(name, {})} for name, group in _DEFAULTS.items()}
    for name, value in (("apply_chat_template", args.apply_chat_template), ("input_template", args.input_template)):
        if trained and value not in (None, found["data"][name]):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: {args.after} was trained with {found['data'][name]} (see its "
                f"{CONFIGURATION}); without the flag, that is used"
            )
        if value is not None:
            found["data"][name] = value
    if found["data"]["max_len"] is not None and found["data"]["max_len"] <= args.max_new_tokens:
        raise InputError(
            f"--max-new-tokens must be below the training's --data.max_len = {found['data']['max_len']}, which has "
            f"the prompt in it too, got {args.max_new_tokens}"
        )
    remote = "://" in args.reward or args.reward.endswith(".py")
    if not remote and not Path(args.reward, "config.json").is_file():
        raise InputError(
            f"--reward {args.reward}: name a Python file that defines reward_func, a server's http://..., or the "
            "folder of a reward model"
        )
    if args.reward.endswith(".py") and not Path(args.reward).is_file():
        raise InputError(f"--reward {args.reward}: no such file")
    found["reward"]["remote_url"] = args.reward.split(",") if remote else None
    found["reward"]["model_name_or_path"] = args.reward
    found["actor"] = {"model_name_or_path": str(args.before)}
    return recipe.namespace(found)


def inputs(args: argparse.Namespace, run: SimpleNamespace) -> tuple[Any, Any]:
    """The prompts with their labels, and the reward, after it was tried on the first prompt.

    Raises:
        InputError: either is of no use.
    """
    from bond_plugin.host.rewards import RewardError
    from bond_plugin.offline import prompts, scoring

    try:
        rows = prompts.read_rows(args.prompts, args.input_key, args.label_key)
        tokenizer = prompts.tokenizer_of(run)
        pairs = prompts.held_out(rows, run.data, tokenizer, "--apply-chat-template")
    except prompts.DataError as error:
        raise InputError(f"--prompts {error}") from error
    try:
        score = scoring.scorer(run, tokenizer)
        scoring.try_out(score, pairs[0], tokenizer)
    except RewardError as error:
        raise InputError(f"--reward: {error}") from error
    return pairs, score


def _vocabulary(flag: str, folder: Path) -> int | None:
    """The size of a model's vocabulary by its configuration, after a look at whether its files are there."""
    if not folder.is_dir():
        raise InputError(f"{flag} {folder}: no such folder. It names a model's folder, not a hub's model name")
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{flag} {folder} has no config.json: name the folder that holds the model itself")
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise InputError(f"{flag} {folder} has no weights (*.safetensors): was the model saved completely?")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{flag} {folder} has no tokenizer: copy tokenizer* from the initial policy's folder")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{flag} {config} is not JSON ({error}): was the model saved completely?") from error
    return content.get("vocab_size", content.get("text_config", {}).get("vocab_size"))


def _say_from(started: float) -> Callable[[str], None]:
    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {message}", flush=True)

    return say

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
from typing import Any

from bond_plugin.files import write_whole

_DESCRIPTION = """\
Sample two models on the same held-out prompts, score the samples with a reward file, and report

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


class UsageError(ValueError):
    """A flag's value cannot be used. The message names the flag and what to do."""


def main(argv: list[str]) -> int:
    """Evaluate. Returns the exit status: 2 for unusable inputs, 1 if sampling, reward or models fail."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; never look for them anywhere else
    try:
        prompts, labels = check(args)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (UsageError, OSError) as error:
        print(f"bond evaluate: error: {error}", file=sys.stderr)
        return 2

    from bond_plugin import evaluation
    from bond_plugin.host.engine import SamplingError

    say = _say_from(time.monotonic())
    try:
        result = evaluation.evaluate(
            args.before,
            args.after,
            prompts,
            args.reward,
            labels=labels,
            samples=args.samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            kl_samples=args.kl_samples,
            seed=args.seed,
            cache_dir=args.output_dir / "cache",
            say=say,
        )
    except (evaluation.EvaluationError, SamplingError) as error:
        print(f"bond evaluate: error: {error}", file=sys.stderr)
        return 1
    written = [args.output_dir / "evaluation.json"]
    write_whole(written[0], result.to_json() + "\n")
    if args.metrics is not None:
        written.append(args.output_dir / "curves.png")
        evaluation.plot_curves(args.metrics, written[1], result)
    print(f"\n{evaluation.format_table(result)}\n")
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
    models = parser.add_argument_group("what to compare")
    models.add_argument(
        "--before", type=Path, required=True, metavar="DIR", help="initial policy: weights and tokenizer"
    )
    models.add_argument(
        "--after", type=Path, required=True, metavar="DIR", help="trained policy, with the same tokenizer"
    )
    models.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="held-out prompts, one JSON object a line",
    )
    models.add_argument(
        "--input-key",
        default="input",
        metavar="KEY",
        help="the key that holds the prompt (default %(default)s)",
    )
    models.add_argument(
        "--label-key",
        metavar="KEY",
        help="the key that holds the label for the reward function (default none)",
    )
    models.add_argument(
        "--reward",
        type=Path,
        required=True,
        metavar="FILE.py",
        help="reward_func(queries, prompts, labels), the file that --reward.remote_url names in training",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--samples",
        type=int,
        default=16,
        metavar="K",
        help="samples a prompt from each model; Best-of-N is reported for N up to K (default %(default)s)",
    )
    sampling.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="T",
        help="where responses are cut off; use the value of the training (default %(default)s)",
    )
    sampling.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default %(default)s)")
    sampling.add_argument(
        "--kl-samples",
        type=int,
        default=2,
        metavar="S",
        help="samples a prompt on which the KL is computed, at most K (default %(default)s)",
    )
    sampling.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--metrics", type=Path, metavar="FILE.jsonl", help="metrics.jsonl of the run: also draw curves.png"
    )
    output.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="made if missing")
    return parser


def check(args: argparse.Namespace) -> tuple[list[str], list[Any] | None]:
    """Look at every input, the reward file last because it has to be run.

    Returns:
        The prompts, and their labels if ``--label-key`` is given.

    Raises:
        UsageError: the first problem found.
    """
    for flag, value, least in (
        ("--samples", args.samples, 1),
        ("--max-new-tokens", args.max_new_tokens, 1),
        ("--kl-samples", args.kl_samples, 1),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            raise UsageError(f"{flag} must be at least {least}, got {value}")
    if args.kl_samples > args.samples:
        raise UsageError(f"--kl-samples must be at most --samples = {args.samples}, got {args.kl_samples}")
    if not 0 < args.temperature < float("inf"):
        raise UsageError(f"--temperature must be above 0, got {args.temperature}")
    sizes = [_vocabulary("--before", args.before), _vocabulary("--after", args.after)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"--after {args.after} has a vocabulary of {sizes[1]} tokens and --before one of {sizes[0]}: "
            "give the model that --after was trained from"
        )
    from bond_plugin import evaluation

    try:
        prompts, labels = evaluation.read_prompts(args.prompts, args.input_key, args.label_key)
    except evaluation.EvaluationError as error:
        raise UsageError(f"--prompts {error}") from error
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UsageError(f"--output-dir {args.output_dir} is a file: name a folder")
    _check_metrics(args.metrics)
    _check_reward(args.reward, prompts[0], "" if labels is None else labels[0])
    return prompts, labels


def _vocabulary(flag: str, folder: Path) -> int | None:
    """The size of a model's vocabulary by its configuration, after a look at whether its files are there."""
    if not folder.is_dir():
        raise UsageError(f"{flag} {folder}: no such folder. It names a model's folder, not a hub's model name")
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"{flag} {folder} has no config.json: name the folder that holds the model itself")
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise UsageError(f"{flag} {folder} has no weights (*.safetensors): was the model saved completely?")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UsageError(f"{flag} {folder} has no tokenizer: copy tokenizer* from the initial policy's folder")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{flag} {config} is not JSON ({error}): was the model saved completely?") from error
    return content.get("vocab_size", content.get("text_config", {}).get("vocab_size"))


def _check_metrics(path: Path | None) -> None:
    from bond_plugin import evaluation

    if path is not None:
        try:
            evaluation.read_metrics(path)
        except evaluation.EvaluationError as error:
            raise UsageError(f"--metrics {error}. It is the file in the run's output folder") from error


def _check_reward(path: Path, prompt: str, label: Any) -> None:
    """Score the first prompt without a response: what is missing shows now, not after sampling."""
    from bond_plugin import evaluation

    if path.suffix != ".py":
        raise UsageError(f"--reward {path}: name a Python file that defines reward_func(queries, prompts, labels)")
    try:
        evaluation.score(evaluation.load_reward(path), [prompt], [prompt], [label])
    except evaluation.EvaluationError as error:
        raise UsageError(f"--reward {error}") from error


def _say_from(started: float) -> Callable[[str], None]:
    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {message}", flush=True)

    return say

"""``bond evaluate``: compare a trained policy with its initial policy on held-out prompts.

Everything that can be wrong with the inputs is looked at first, since sampling takes minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import PositiveInt, create_model

from bond_plugin import options, recipe
from bond_plugin.files import ContentError, read_json, unwritable, write_whole
from bond_plugin.offline.prompts import CONFIGURATION, template_problem
from bond_plugin.schema import Open, read_model
from bond_plugin.words import reason, timed

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


def _group(**fields: Any) -> tuple[type[Open], Open]:
    model = create_model("Group", __base__=Open, **fields)
    return model, model()


#: What the host's code asks of a run's arguments, with what stands where the trained folder does not say.
_Run = create_model(
    "_Run",
    __base__=Open,
    data=_group(
        apply_chat_template=(bool, False),
        input_template=(str | None, None),
        disable_fast_tokenizer=(bool, False),
        max_len=(PositiveInt | None, None),
    ),
    reward=_group(normalize_enable=(bool, False)),
    ds=_group(
        attn_implementation=(str, "sdpa"),
        experts_implementation=(str | None, None),
        param_dtype=(str, "bf16"),
        load_in_4bit=(bool, False),
        value_head_prefix=(str, "score"),
    ),
    rollout=_group(micro_batch_size=(PositiveInt, 8)),
    vllm=_group(tensor_parallel_size=(PositiveInt, 1)),
)

REWARD_HELP = (
    "a file with reward_func(queries, prompts, labels), a server's address or several with commas, or a reward "
    "model's folder: what --reward.remote_url or --reward.model_name_or_path is in training"
)

#: The sampling, by name: default, the least that makes sense, what stands for it, and its help.
_NUMBERS = {
    "samples": (16, 1, "K", "samples a prompt from each model; Best-of-N is reported for N up to K"),
    "max-new-tokens": (32, 1, "T", "where responses are cut off; use the value of the training"),
    "kl-samples": (2, 1, "S", "samples a prompt on which the KL is computed, at most K"),
    "seed": (0, 0, "SEED", "of the sampling"),
}


def main(argv: list[str]) -> int:
    """Evaluate. Returns the exit status: 2 for unusable inputs, 1 if sampling, reward or models fail."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; never look for them anywhere else
    try:
        metrics = check(args)
        run = arguments(args, args.before, args.after)
        tokenizer, pairs = read_prompts(args, run)
        score = load_reward(run, tokenizer, pairs[0])
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        print(f"bond evaluate: error: {error}", file=sys.stderr)
        return 2

    from bond_plugin.bench import figures, two
    from bond_plugin.host.rewards import RewardError
    from bond_plugin.offline import engine, likelihood, measure

    try:
        result = two.Evaluation(args, pairs, score, run, timed()).run()
    except (engine.SamplingError, RewardError, likelihood.VocabularyError, measure.TokenizerError) as error:
        print(f"bond evaluate: error: {error}", file=sys.stderr)
        return 1
    files = {args.output_dir / "evaluation.json": two.to_json(result) + "\n"}
    if metrics is not None:
        files[args.output_dir / "curves.png"] = figures.png(figures.run_curves(metrics, result))
    for path, content in files.items():
        write_whole(path, content)
    print(f"\n{two.format_table(result)}\n\nwritten: {', '.join(map(str, files))}", flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser("evaluate", _DESCRIPTION, _EPILOG)
    models = parser.add_argument_group("what to compare").add_argument
    models("--before", metavar="DIR", type=Path, required=True, help="initial policy: weights and tokenizer")
    models("--after", metavar="DIR", type=Path, required=True, help="trained policy, with the same tokenizer")
    models("--prompts", metavar="FILE.jsonl", type=Path, required=True, help="held-out prompts, a JSON object a line")
    prompt_flags(models, "--after")
    models("--reward", metavar="REWARD", required=True, help=REWARD_HELP)
    sampling = parser.add_argument_group("sampling").add_argument
    for name, (default, _, metavar, text) in _NUMBERS.items():
        sampling(f"--{name}", metavar=metavar, type=int, default=default, help=f"{text} (default %(default)s)")
    sampling("--temperature", type=float, default=1.0, help="of the sampling (default %(default)s)")
    sampling(
        "--engines",
        metavar="E",
        type=int,
        help="vLLM engines that sample side by side, each with as many GPUs as in the training (default: all GPUs)",
    )
    output = parser.add_argument_group("output").add_argument
    output("--metrics", metavar="FILE.jsonl", type=Path, help="metrics.jsonl of the run: also draw curves.png")
    output("--output-dir", metavar="DIR", type=Path, required=True, help="made if missing")
    return parser


def prompt_flags(add: Callable[..., Any], folder: str) -> None:
    """The flags that say what is in a file of prompts, for a command whose flag ``folder`` names a trained model."""
    add("--input-key", metavar="KEY", default="input", help="the key that holds the prompt (default %(default)s)")
    add("--label-key", metavar="KEY", help="the key that holds the label for the reward (default none)")
    add(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        help="put the prompts into the tokenizer's chat template, as --data.apply_chat_template does in training "
        f"(default: what the training did, if {folder} has its run.json, else no)",
    )
    add(
        "--input-template",
        metavar="TEXT",
        help="put each prompt in the place of {}, as --data.input_template does in training (default: likewise)",
    )


def check(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Look at all that needs neither models nor the host: the metrics, if there are to be curves, or a ValueError."""
    check_sampling(args, _NUMBERS)
    options.at_least(vars(args), {"engines": 1})
    if args.kl_samples > args.samples:
        raise ValueError(f"--kl-samples must be at most --samples = {args.samples}, got {args.kl_samples}")
    sizes = [vocabulary("--before", args.before), vocabulary("--after", args.after)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--after {args.after} has a vocabulary of {sizes[1]} tokens and --before one of {sizes[0]}: "
            "give the model that --after was trained from"
        )
    if problem := unwritable(args.output_dir):
        raise ValueError(f"--output-dir {problem}; name another folder")
    if args.seed >= 2**32 - 1:  # the trained policy has the next one
        raise ValueError(f"--seed must be below 2^32 - 1, got {args.seed}")
    if args.metrics is None:
        return None
    from bond_plugin.host import metrics

    try:
        return metrics.read(args.metrics)
    except (OSError, ContentError) as error:
        problem = f"{args.metrics}: {reason(error)}" if isinstance(error, OSError) else error
        raise ValueError(f"--metrics {problem}. It is the file in the run's output folder") from error


def check_sampling(args: argparse.Namespace, numbers: dict[str, tuple[Any, int, str, str]]) -> None:
    """Raises ValueError for the first of the numbers and the template that is of no use."""
    options.at_least(vars(args), {name: least for name, (_, least, _, _) in numbers.items()})
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature must be above 0, got {args.temperature}")
    if args.input_template is not None and (problem := template_problem(args.input_template)):
        raise ValueError(f"--input-template {problem}")


def arguments(args: argparse.Namespace, policy: Path | None, trained_in: Path | None) -> SimpleNamespace:
    """The host's arguments, as far as prompts and reward need them: the training's, where its folder has them.

    Raises ValueError for what is not as in the training, and for a reward that is nowhere.

    Args:
        policy: whose tokenizer is meant; without one, that of the reward model.
        trained_in: the folder of a trained policy.
    """
    from bond_plugin.host.inputs import reward as reward_problems

    trained = None if trained_in is None else read_model(trained_in / CONFIGURATION, _Run)
    found = (trained or _Run()).model_dump(include=set(_Run.model_fields))
    for name, value in (("apply_chat_template", args.apply_chat_template), ("input_template", args.input_template)):
        if trained and value not in (None, found["data"][name]):
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: {trained_in} was trained with {found['data'][name]} (see its "
                f"{CONFIGURATION}); without the flag, that is used"
            )
        if value is not None:
            found["data"][name] = value
    if found["data"]["max_len"] is not None and found["data"]["max_len"] <= args.max_new_tokens:
        raise ValueError(
            f"--max-new-tokens must be below the training's --data.max_len = {found['data']['max_len']}, which has "
            f"the prompt in it too, got {args.max_new_tokens}"
        )
    reward = args.reward
    remote = reward is not None and ("://" in reward or reward.endswith(".py"))
    if reward is not None and not remote and not Path(reward, "config.json").is_file():
        raise ValueError(
            f"--reward {reward}: name a Python file that defines reward_func, a server's http://..., or the "
            "folder of a reward model"
        )
    urls = reward.split(",") if remote else []
    for url in urls:
        if problem := next(reward_problems(url), None):
            raise ValueError(f"--reward {url}: {problem}")
    if len(urls) > 1 and any(url.endswith(".py") for url in urls):
        raise ValueError(f"--reward {reward}: of several the host takes servers alone; give one file")
    found["reward"] |= {"remote_url": urls or None, "model_name_or_path": reward}
    found["rollout"] |= {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    found["actor"] = {"model_name_or_path": str(policy or reward)}
    return recipe.namespace(found)


def read_prompts(args: argparse.Namespace, run: SimpleNamespace) -> tuple[Any, Any]:
    """The policy's tokenizer, and the prompts with their labels; a ValueError if they are of no use."""
    from bond_plugin.offline import prompts

    flags = ("--input-key", "--label-key", "--apply-chat-template")
    keys, chat = (args.input_key, args.label_key), run.data.apply_chat_template
    try:
        tokenizer = prompts.tokenizer_of(run)
        template = prompts.chat_template(tokenizer) if chat else None
        rows = prompts.read_rows(args.prompts, prompts.Lines(keys, flags, chat, template))
        return tokenizer, prompts.held_out(rows, run.data, tokenizer, "--apply-chat-template")
    except prompts.DataError as error:
        raise ValueError(f"--prompts {error}") from error


def load_reward(run: SimpleNamespace, tokenizer: Any, pair: tuple[str, Any]) -> Any:
    """The reward, after it was tried on a prompt; a ValueError if it is of no use."""
    from bond_plugin.host.rewards import RewardError
    from bond_plugin.offline import scoring

    try:
        score = scoring.scorer(run, tokenizer)
        scoring.try_out(score, pair, tokenizer)
    except RewardError as error:
        raise ValueError(f"--reward: {error}") from error
    return score


def vocabulary(flag: str, folder: Path) -> int | None:
    """The size of a policy's vocabulary by its configuration; a ValueError if its files are not whole."""
    from bond_plugin.host import models

    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder. It names a model's folder, not a hub's model name")
    if problem := next(models.files(folder, policy=True), None):
        raise ValueError(f"{flag} {folder}: {problem}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{flag} {folder} has no tokenizer: copy tokenizer* from the initial policy's folder")
    if problem := next(models.unloadable(folder, language=True), None):
        raise ValueError(f"{flag} {folder}: {problem}")
    content = read_json(folder / "config.json")
    inner = content.get("text_config")
    return content.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)

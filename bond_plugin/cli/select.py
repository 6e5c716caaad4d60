"""``bond select``: Best-of-N at inference, with any reward, or a vote over answers."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin import options
from bond_plugin.cli import evaluate
from bond_plugin.files import Busy, unwritable
from bond_plugin.words import timed

_DESCRIPTION = """\
Sample N responses to each prompt, score them, and select one:

  best       the highest reward: Best-of-N
  soft       one at random, with probability exp(reward / t) / sum of these: soft Best-of-N (arXiv 2505.03156)
  majority   one with the answer that most have: self-consistency (arXiv 2203.11171); needs no reward
  weighted   one with the answer whose rewards add up to most: verifier voting (arXiv 2206.02336)

Then say what each smaller N would have given: the reward, and where rewards are 0 or 1 or --label-is-answer, how
often each selector is right. These are estimates without bias from all N responses, each with a 95 % bootstrap
interval over the prompts.
"""

_EPILOG = """\
Written to --output: a JSON object a prompt, in their order, as soon as it is selected ("prompt", "response",
"reward", "rewards", "answers", ...); and beside it NAME.settings.json. The same command started again goes on where
it was stopped; other settings are refused. Answers are what stands in the last \\boxed{}, else the last line,
normalised as sums are by the host's checker; or what --answer says.

examples:
  bond select --model demo/model --prompts demo/heldout.jsonl --reward recipes/reviews/reward.py \\
    --samples 16 --output selected.jsonl
  bond select --responses rewards.jsonl --selector soft --reward-temperature 0.5 --output selected.jsonl
  bond select --model DIR --prompts sums.jsonl --label-key answer --label-is-answer --selector majority \\
    --output selected.jsonl
"""

#: As in ``bond evaluate``.
_NUMBERS = {
    "samples": (None, 1, "N", "responses a prompt (default 16; with --responses all that are there)"),
    "max-new-tokens": (512, 1, "T", "where responses are cut off (default %(default)s)"),
    "tensor-parallel-size": (1, 1, "GPUS", "GPUs that the model is spread over (default %(default)s)"),
    "seed": (0, 0, "SEED", "of sampling, draws and the table's subsets (default %(default)s)"),
}


def main(argv: list[str]) -> int:
    """Select. Returns the exit status: 2 for unusable inputs, 1 if sampling, reward or answers fail."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; never look for them anywhere else
    with contextlib.ExitStack() as stack:
        try:
            check(args)
            run = evaluate.arguments(args, args.model, args.model)
            run.vllm.tensor_parallel_size = args.tensor_parallel_size
            job = prepare(args, run)
            output, lines = stack.enter_context(job.output)
        except (ValueError, Busy) as error:
            print(f"bond select: error: {error}", file=sys.stderr)
            return 2

        from bond_plugin.host.rewards import RewardError
        from bond_plugin.offline import engine, selecting
        from bond_plugin.rewards.answers import SelectionError

        say = timed()
        say(f"{job.total} prompts into {args.output}" + (f"; {len(lines)} are there already" if lines else ""))
        tick = engine.ticker(say, "selected", "prompts")
        try:
            with contextlib.closing(job.lines(len(lines), engine.ticker(say, "sampled"))) as made:
                for line in made:
                    output.write(line)
                    lines.append(selecting.Selected.model_validate(line))
                    tick(len(lines), job.total)
        except KeyboardInterrupt:
            print(f"\nbond select: stopped. {len(lines)} of {job.total} prompts are in {args.output}; the same "
                  "command goes on")  # fmt: skip
            return 130
        except (engine.SamplingError, RewardError, SelectionError) as error:
            print(f"bond select: error: {error}", file=sys.stderr)
            return 1
        say(f"{job.total} prompts are in {args.output}")
        print(f"\n{selecting.table(lines, args, job.right)}", flush=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = options.parser("select", _DESCRIPTION, _EPILOG)
    what = parser.add_argument_group("what to select from").add_argument
    what("--model", metavar="DIR", type=Path, help="the policy to sample: weights and tokenizer")
    what("--prompts", metavar="FILE.jsonl", type=Path, help="prompts, a JSON object a line")
    evaluate.prompt_flags(what, "--model")
    what(
        "--responses",
        metavar="FILE.jsonl",
        type=Path,
        help="instead of --prompts: responses that are there, as bond cache writes them or with --keep-responses: "
        '"prompt", "responses", and if they are there "rewards" and "label". A --model beside it is not sampled: its '
        "tokenizer says what special tokens are, which are taken out of responses; else those are that look like one",
    )
    how = parser.add_argument_group("selection").add_argument
    how("--selector", choices=("best", "soft", "majority", "weighted"), default="best", help="default %(default)s")
    how("--reward", metavar="REWARD", help=f"{evaluate.REWARD_HELP} (default: that of --responses)")
    how("--reward-temperature", metavar="T", type=float, default=1.0, help="t of soft (default %(default)s)")
    how("--ties", choices=("first", "random"), default="first", help="of equals (default %(default)s)")
    how(
        "--answer",
        metavar="FILE.py",
        type=Path,
        help="a file with answer_func(response), which gives the answer as a text, or None; equal texts are equal",
    )
    how(
        "--label-is-answer",
        action="store_true",
        help="labels are the right answers, read as responses are: report the accuracy of all selectors",
    )
    sampling = parser.add_argument_group("sampling").add_argument
    for name, (default, _, metavar, text) in _NUMBERS.items():
        sampling(f"--{name}", metavar=metavar, type=int, default=default, help=text)
    sampling("--temperature", type=float, default=1.0, help="of the sampling (default %(default)s)")
    output = parser.add_argument_group("output").add_argument
    output("--output", metavar="FILE.jsonl", type=Path, required=True, help="made if missing, with its folder")
    output("--keep-responses", action="store_true", help="write all responses, so that --responses can read them")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for the first problem that neither models nor the host are needed to see."""
    evaluate.check_sampling(args, _NUMBERS)
    if not 0 < args.reward_temperature < math.inf:
        raise ValueError(f"--reward-temperature must be above 0, got {args.reward_temperature}")
    if (args.prompts is None) == (args.responses is None):
        raise ValueError("--prompts or --responses: give one of the two")
    if args.responses is None:
        if args.model is None:
            raise ValueError("--model is missing: it names the policy that --prompts are given to")
        if args.reward is None and args.selector != "majority":
            raise ValueError(f"--reward is missing: --selector {args.selector} needs it")
        if args.label_is_answer and args.label_key is None:
            raise ValueError("--label-key is missing: --label-is-answer needs it")
    else:
        for flag in ("label_key", "apply_chat_template", "input_template"):
            if getattr(args, flag) is not None:
                raise ValueError(
                    f"--{flag.replace('_', '-')} goes with --prompts; --responses has prompts as they were"
                )
    if args.model is not None:
        evaluate.vocabulary("--model", args.model)
    if args.output.is_dir():
        raise ValueError(f"--output {args.output}: a folder, not a file")
    if problem := unwritable(args.output.absolute().parent):
        raise ValueError(f"--output {problem}")


def prepare(args: argparse.Namespace, run: SimpleNamespace) -> SimpleNamespace:
    """Everything before the sampling: prompts, reward, answers, and the settings by which a file is known again.

    Raises ValueError if one of them is of no use.
    """
    from bond_plugin.offline import engine, fingerprints, prompts, scoring, selecting
    from bond_plugin.rewards import answers, calls

    names = ("selector", "reward_temperature", "ties", "seed", "samples", "label_is_answer", "keep_responses")
    settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    tokenizer, given, count = None, None, args.samples
    if args.model is not None:
        settings["--model"] = {"name": str(args.model), "sha256": fingerprints.of_model(args.model)}
    if args.responses is None:
        tokenizer, pairs = evaluate.read_prompts(args, run)
        count = count or 16
        settings |= {"--samples": count, "--max-new-tokens": args.max_new_tokens, "--temperature": args.temperature}
        settings |= {"--prompts": {"name": str(args.prompts), "sha256": fingerprints.of_value(pairs)}}
        settings["the training's --data.max_len"] = run.data.max_len
    else:
        try:
            given = selecting.read_given(args.responses, count or 1)
        except ValueError as error:
            raise ValueError(f"--responses {error}") from error
        pairs = [(line.prompt, line.label) for line in given]
        settings["--responses"] = {"name": str(args.responses), "sha256": fingerprints.of_file(args.responses)}
        if args.model is not None or (args.reward and not run.reward.remote_url):
            tokenizer = prompts.tokenizer_of(run)
        missing = next((line for line in given if line.rewards is None), None)
        if args.reward is None and args.selector != "majority" and missing is not None:
            raise ValueError(f"--reward is missing: {args.responses} has no 'rewards' of {missing.prompt[:60]!r}")
    score = None if args.reward is None else evaluate.load_reward(run, tokenizer, pairs[0])
    settings["--reward"] = None if score is None else scoring.identity(run)
    parse = None
    if args.selector in ("majority", "weighted") or args.answer is not None or args.label_is_answer:
        try:
            parse = answers.parser(args.answer)
        except answers.SelectionError as error:
            raise ValueError(f"--answer {error}") from error
        settings["--answer"] = None if args.answer is None else fingerprints.of_file(args.answer)
    right = None
    if args.label_is_answer:
        for prompt, label in pairs:
            if isinstance(label, bool) or not isinstance(label, str | int | float) or label == "":
                raise ValueError(
                    f"--label-is-answer: the label of {prompt[:60]!r} is no text or number, but {label!r}"
                )
        right = [parse(str(label)) or str(label) for _, label in pairs]
    special = [] if args.model is None else tokenizer.all_special_tokens

    def plain(text: str) -> str:
        if args.model is None:
            return calls.plain(text)
        return functools.reduce(lambda text, token: text.replace(token, ""), special, text)

    def drawn(first: int, progress: engine.Progress) -> Iterator[tuple[int, engine.PromptSamples]]:
        if given is not None:
            left = enumerate(given[first:], first)
            return ((i, scoring.of_texts(line.prompt, line.responses[:count], tokenizer)) for i, line in left)
        width = args.tensor_parallel_size
        draw = functools.partial(
            engine.stream,
            args.model,
            n=count,
            seed=args.seed,
            chunk=engine.chunk_of(count),
            progress=progress,
            **scoring.sampling(run, score, engine.count(width), width),
        )
        return engine.remaining([prompt for prompt, _ in pairs], lambda i: i < first, draw, engine.chunk_of(count))

    def lines(first: int, progress: engine.Progress) -> Iterator[dict[str, Any]]:
        with contextlib.closing(drawn(first, progress)) as samples:
            for i, one in samples:
                (prompt, label), rewards, answers = pairs[i], None, None
                if score is not None:
                    rewards = scoring.rewards(score, [pairs[i]], [one])[0].tolist()
                elif given is not None and given[i].rewards:
                    rewards = given[i].rewards[:count]
                texts = [plain(text) for text in one.responses]
                if parse is not None:
                    answers = [parse(text) for text in texts]
                j = selecting.choose(args, i, prompt, rewards, answers)
                line = {
                    "prompt": prompt,
                    "label": None if label == "" else label,
                    "response": texts[j],
                    "reward": rewards and rewards[j],
                    "selector": args.selector,
                    "selected": j,
                    "rewards": rewards,
                    "answer": answers and answers[j],
                    "answers": answers,
                    "responses": one.responses if args.keep_responses else None,
                }
                yield {key: value for key, value in line.items() if value is not None}

    output = selecting.output(args.output, settings)
    return SimpleNamespace(output=output, total=len(pairs), right=right, lines=lines)

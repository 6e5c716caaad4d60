"""Prepare the sums task: prompts from reasoning-gym, whose answers a program checks. Reward 0 or 1.

Each prompt shows three solved sums and asks a fourth, which a small model that was never taught to answer in a
format can go on with:

    41 + 7 = 48
    15 - 22 = -7
    60 + 18 = 78
    23 - 60 =

The label is the whole entry of the task, so that the reward can hand it to reasoning-gym's own checker; the answer
is for `bond select --label-is-answer`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages import write_rows

SHOTS = 3
TRAIN_SEED, HELDOUT_SEED = 1, 2


def entries(size: int, seed: int, digits: int) -> list[dict]:
    """``size`` prompts with their labels; different seeds give different sums."""
    try:
        import reasoning_gym
    except ImportError:
        raise SystemExit("reasoning-gym is missing: pip install reasoning-gym==0.1.25") from None

    data = reasoning_gym.create_dataset(
        "chain_sum", size=size * (SHOTS + 1), seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=digits
    )
    made = []
    for i in range(size):
        *shots, asked = (data[i * (SHOTS + 1) + j] for j in range(SHOTS + 1))
        lines = [f"{shot['metadata']['expression']} = {shot['answer']}" for shot in shots]
        prompt = "\n".join([*lines, f"{asked['metadata']['expression']} ="])
        label = {name: asked[name] for name in ("question", "answer", "metadata")}
        made.append({"input": prompt, "label": json.dumps(label), "answer": asked["answer"]})
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to write sums-train.jsonl and sums-heldout.jsonl")
    parser.add_argument("--train", type=int, default=512, help="training prompts (default: 512)")
    parser.add_argument("--heldout", type=int, default=128, help="held-out prompts (default: 128)")
    parser.add_argument("--digits", type=int, default=2, help="numbers have 1 to this many digits (default: 2)")
    args = parser.parse_args(argv)
    args.directory.mkdir(parents=True, exist_ok=True)
    held = entries(args.heldout, HELDOUT_SEED, args.digits)
    asked = {entry["input"] for entry in held}
    train = [entry for entry in entries(args.train, TRAIN_SEED, args.digits) if entry["input"] not in asked]
    for name, rows in (("train", train), ("heldout", held)):
        path = args.directory / f"sums-{name}.jsonl"
        write_rows(path, rows)
        print(f"{path}: {len(rows)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())

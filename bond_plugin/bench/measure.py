"""Measures one policy of ``bond bench``, in a process of its own (``python -m bond_plugin.bench.measure JOB.json``):
what torch, transformers and vLLM hold is given back when it ends.

The reference is measured first: its samples are what every policy is compared with, and are kept in
``reference-samples.json`` beside ``reference.json``. The numbers are those of :mod:`bond_plugin.offline.measure`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bond_plugin import recipe
from bond_plugin.files import read_json, write_json
from bond_plugin.offline import engine, likelihood, scoring
from bond_plugin.offline.measure import Scored, measure, read_samples, save_samples
from bond_plugin.offline.prompts import Pairs, held_out, tokenizer_of
from bond_plugin.offline.reward_cache import cached_responses

DIGITS = 5
"""Significant digits in the files: what is more is noise."""


def run(job: SimpleNamespace) -> None:
    """Sample, score, measure, and write ``job.output``.

    Args:
        job: ``model``, the policy's folder, or ``None`` for the reference, whose samples are kept; the files
            ``output`` and ``reference_samples``; held-out ``rows`` of :func:`bond_plugin.offline.prompts.read_rows`;
            ``configuration``, the host's nested arguments of the training runs: reference, template, reward, longest
            response and temperature are those of training; and ``evaluation``, the fields of
            :class:`bond_plugin.bench.matrix.Measuring`.

    Raises:
        DataError, RewardError, SamplingError, TokenizerError: as they say.
    """
    started, settings = time.monotonic(), job.evaluation
    args = recipe.namespace(job.configuration)
    model = args.actor.model_name_or_path = job.model or args.actor.model_name_or_path
    tokenizer = tokenizer_of(args)
    pairs = held_out(job.rows, args.data, tokenizer, "data.apply_chat_template in 'common'")
    score = scoring.scorer(args, tokenizer)
    if job.model is None:
        scoring.try_out(score, pairs[0], tokenizer)
    # On a cluster, runs of other cells have GPUs of this machine that cannot be told from here.
    engines = 1 if "RAY_ADDRESS" in os.environ else None
    count = settings["reference_samples" if job.model is None else "samples"]
    # The reference has another seed: a policy that is close to it would draw the same responses.
    drawn = sample(args, model, pairs, score, count, settings["seed"] + (job.model is None), engines)
    rewards = scoring.rewards(score, pairs, drawn)
    if job.model is None:
        save_samples(Path(job.reference_samples), drawn, rewards=rewards.tolist())
    samples, kept = read_samples(Path(job.reference_samples))
    reference = Scored(samples, torch.tensor(kept["rewards"], dtype=torch.float64))
    found = {
        "prompts": [prompt for prompt, _ in pairs],
        "evaluation": numbers(job, Scored(drawn, rewards), reference),
        "examples": [
            {"prompt": prompt, "response": one.queries[0][len(prompt) :], "reward": round(reward, 4)}
            for (prompt, _), one, reward in zip(pairs, drawn, rewards[:, 0].tolist(), strict=True)
        ][: settings["examples"]],
        "seconds": round(time.monotonic() - started, 1),
        "generated_tokens": sum(len(ids) for one in drawn for ids in one.response_ids),
        "cached_tokens": 0,
    }
    if cache := job.configuration.get("bond", {}).get("reward_cache"):
        texts = tokenizer(cached_responses(cache), add_special_tokens=False)["input_ids"]
        found["cached_tokens"] = sum(len(ids) for ids in texts)
    write_json(Path(job.output), found)


def sample(
    args: SimpleNamespace,
    model: str | Path,
    pairs: Pairs,
    score: scoring.Score,
    count: int,
    seed: int,
    engines: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[engine.PromptSamples]:
    """``count`` responses of a model to each prompt, as a training with the host's ``args`` draws them.

    ``engines`` sample side by side, by default as many as there are GPUs for; beside them the reward has its place.
    Raises SamplingError if vLLM failed.
    """
    width = min(args.vllm.tensor_parallel_size, len(engine.gpus()) or 1)
    how = scoring.sampling(args, score, engine.count(width, engines), width)
    return engine.sample(model, [prompt for prompt, _ in pairs], count, seed=seed, progress=progress, **how)


def numbers(job: SimpleNamespace, policy: Scored, reference: Scored) -> dict[str, Any]:
    """All numbers of one policy, rounded: :class:`bond_plugin.bench.results.Measured`."""
    own = job.configuration["actor"]["model_name_or_path"]
    found = measure(
        likelihood.load(own) if job.model is None else likelihood.load(job.model, own),
        policy,
        reference,
        temperature=job.configuration["rollout"]["temperature"],
        **{key: job.evaluation[key] for key in ("samples", "quantile_samples", "bon_levels", "forward_samples")},
    )
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Tensor):
        return [float(f"{one:.{DIGITS}g}") for one in value.tolist()]
    return round(value, DIGITS)


if __name__ == "__main__":
    run(SimpleNamespace(**read_json(Path(sys.argv[1]))))

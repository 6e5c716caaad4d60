"""The reward cache beside the host: how it is made, and whether it is a run's.

``bond cache`` calls :func:`make` where ``bond train`` starts Ray. A training run calls :func:`problems` there, and
asks :func:`of` at each step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin.files import Busy, ContentError, unwritable
from bond_plugin.host import flags, plan
from bond_plugin.host.rewards import RewardError
from bond_plugin.offline import columns, engine, fingerprints, reward_cache, scoring
from bond_plugin.offline.engine import PromptSamples
from bond_plugin.offline.prompts import DataError, Pairs, label_text, tokenizer_of, training_prompts
from bond_plugin.words import shorten

_WITH_TOKENS = "with bond cache --cache.log_probs"
_COLUMN = "column"  # the kind of reward of a cache that was made of the data's own

_read = functools.cache(reward_cache.read_cache)


def of(args: SimpleNamespace) -> reward_cache.Cache:
    """A run's ``--bond.reward_cache``, read once a process. If :func:`problems` has passed it nothing is missing."""
    return _read(args.bond.reward_cache)


def record_of(args: SimpleNamespace, tokenizer: Any) -> reward_cache.Record:
    """What of a run decides about the rewards of the initial policy's samples, as the first line of a cache."""
    model = args.actor.model_name_or_path
    chat = tokenizer.chat_template if args.data.apply_chat_template else None
    return {
        "model": {"name": model, "sha256": fingerprints.of_model(model)},
        "reward": scoring.identity(args),
        "temperature": args.rollout.temperature,
        "max_new_tokens": args.rollout.max_new_tokens,
        "max_len": args.data.max_len,
        "min_new_tokens": _min_new_tokens(args),
        "template": {
            "apply_chat_template": args.data.apply_chat_template,
            "chat_template": None if chat is None else fingerprints.of_text(str(chat)),
            "input_template": None if args.data.apply_chat_template else args.data.input_template,
        },
    }


def _min_new_tokens(args: SimpleNamespace) -> int:
    """What training samples with: the host itself asks for one token, the rollouts of an algorithm for none."""
    return 0 if plan.of(args).algorithm is not None else 1


# Before anything starts.


def refused(args: SimpleNamespace) -> list[str]:
    """What keeps ``bond cache`` from making a cache with the flags of this run."""
    table = {
        "train.agent_func_path": (bool(args.train.agent_func_path), "multi-turn agents: not supported yet"),
        "data.max_images_per_prompt": (args.data.max_images_per_prompt > 0, "images: not supported yet"),
        "rollout.top_p": (
            args.rollout.top_p != 1.0,
            "the samples must come from the initial policy itself, not from its truncated distribution; use 1.0",
        ),
    }
    for name in ("overlong_buffer_len", "stop_properly_penalty_coef"):
        table[f"reward.{name}"] = (getattr(args.reward, name) is not None, "penalties are not cached")
    found = [f"--{dest} cannot be used with {flags.CACHE}: {why}" for dest, (on, why) in table.items() if on]
    path = os.path.expanduser(args.cache.output)
    if os.path.isdir(path):
        found.append(f"--cache.output {path}: a folder, not a file")
    elif problem := unwritable(os.path.dirname(os.path.abspath(path))):
        found.append(f"--cache.output {problem}")
    return found


def problems(args: SimpleNamespace) -> list[str]:
    """What keeps a training run from using its ``--bond.reward_cache``, each with the fix; empty without one.

    Settles the number of samples in ``args``, for the processes that follow.
    """
    path, run = getattr(args.bond, "reward_cache", ""), plan.of(args)
    stored = run.stored
    if not path:
        why, how = "needs the initial policy's rewards", "made with bond cache"
        if stored:
            why, how = "trains on stored responses", _WITH_TOKENS
        wanted = f"{args.algo.advantage.estimator} {why}: give {flags.REWARD_CACHE}, {how}"
        return [wanted] if run.needs.reward_cache else []
    if args.bond.cache_samples < 0:
        return [f"--bond.cache_samples must be at least 0, got {args.bond.cache_samples}"]
    if not Path(path).is_file():
        return [f"{flags.REWARD_CACHE} {path}: no such file. This makes it: {_command()}"]
    _read.cache_clear()  # it may have changed since
    try:
        found = _read(path)
        tokenizer = tokenizer_of(args)
        pairs = training_prompts(args, tokenizer)
    except (ContentError, DataError) as error:
        return [f"{flags.REWARD_CACHE}: {error}"]
    listed = []
    different = _differences(found, args, tokenizer, pairs)
    if different and args.bond.reward_cache_mismatch == "error":
        reasons = "".join(f"\n      {line}" for line in different)
        listed.append(
            f"{flags.REWARD_CACHE} {path} was not made for this run:{reasons}\n    Make another, or use it all the "
            "same with --bond.reward_cache_mismatch warn"
        )
    else:
        for line in different:
            print(f"bond: warning: {flags.REWARD_CACHE}: {line}", flush=True)
    prompts = [prompt for prompt, _ in pairs]
    try:
        found.check(prompts, args.bond.cache_samples)
    except ContentError as error:
        listed.append(f"{flags.REWARD_CACHE}: {error}. {_remedy(found, prompts, args.bond.cache_samples)}")
    else:
        args.bond.cache_samples = args.bond.cache_samples or found.samples(prompts)
        if stored and any(found[prompt].start is None for prompt in prompts):
            listed.append(f"{flags.REWARD_CACHE} {path} has no tokens and log-probabilities: make it {_WITH_TOKENS}")
        elif stored > (there := found.samples(prompts)):
            listed.append(f"{flags.REWARD_CACHE} {path} has {there} responses a prompt, and a step takes {stored}")
    return listed


def _differences(found: reward_cache.Cache, args: SimpleNamespace, tokenizer: Any, pairs: Pairs) -> list[str]:
    if found.record is None:
        print(
            f"bond: note: {found.path} does not say which model, reward and sampling it was made with; nothing of "
            "that can be checked",
            flush=True,
        )
        return []
    compared = dict(reward_cache.COMPARED)
    if plan.of(args).needs.offline and (rewards := _column_of(found.record)):
        del compared["reward"]  # all that training has are the cache's
        print(
            f"bond: note: rewards of training are those of the column '{rewards}' that {found.path} was made of; "
            "--reward.* is for evaluation alone",
            flush=True,
        )
    listed = reward_cache.differences(found.record, record_of(args, tokenizer), compared)
    for prompt, label in pairs:
        if prompt in found and found[prompt].label != label_text(label):
            listed.append(
                f"the label of the prompt {shorten(prompt)}: {found[prompt].label or 'none'} in the cache, "
                f"{label_text(label) or 'none'} in this run"
            )
            break
    return listed


def _column_of(record: reward_cache.Record) -> str | None:
    """The column that the rewards of a cache come from, if it was not this run's reward that made them."""
    reward = record.get("reward")
    return reward.get("name") if isinstance(reward, dict) and reward.get("kind") == _COLUMN else None


def _remedy(found: reward_cache.Cache, prompts: list[str], samples: int) -> str:
    """What to do about prompts that are missing or have too few samples."""
    there = [prompt for prompt in prompts if prompt in found]
    if len(there) < len(prompts) and found.record is not None:
        known = {key: found.record.get(key) for key in ("samples", "seed", "responses_key")}
        known["rewards_key"] = _column_of(found.record)
        kept = [f"--cache.{key}={value}" for key, value in known.items() if value is not None]
        kept += ["--cache.log_probs"] if found.record.get("log_probs") else []
        return f"This adds what is missing: {_command(*kept)}"
    fewer = f"Use --bond.cache_samples {found.samples(there)}, or make" if len(there) == len(prompts) else "Make"
    asked = [f"--cache.samples={samples}"] if samples else []
    return f"{fewer} another: {_command(*asked, '--cache.output=ANOTHER_FILE')}"


def _command(*more: str) -> str:
    """The ``bond cache`` command that goes with the run of this process."""
    return shlex.join(["bond", "cache", *(word for word in sys.argv[1:] if word != "--dry-run"), *more])


# Making it.


def make(args: SimpleNamespace) -> int:
    """What ``bond cache`` does once everything is checked. Returns the exit status."""
    path = args.cache.output
    try:
        tokenizer = tokenizer_of(args)
        pairs = training_prompts(args, tokenizer)
        _one_label_each(pairs)
        record = {**record_of(args, tokenizer), "samples": args.cache.samples, "seed": args.cache.seed}
        if args.cache.log_probs:
            record["log_probs"] = True
        scored = None
        if args.cache.responses_key:
            record["responses_key"] = args.cache.responses_key
            record["reward"] = {"kind": _COLUMN, "name": args.cache.rewards_key, "data": args.data.prompt_dataset}
            scored = columns.Scored(args, tokenizer)
        with reward_cache.Writer(os.path.expanduser(path), record) as writer:
            try:
                _fill(args, writer, pairs, tokenizer, scored)
            except KeyboardInterrupt:
                there = sum(prompt in writer.cache for prompt, _ in pairs)
                print(
                    f"\nbond cache: stopped. {there} of {len(pairs)} prompts are in {path}; the same command goes on"
                )
                return 130
            print(f"\n{path}: {writer.cache.summary([prompt for prompt, _ in pairs])}", flush=True)
    except (RewardError, ContentError, Busy, DataError, engine.SamplingError) as error:
        if isinstance(error, RewardError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"{flags.CACHE}: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _one_label_each(pairs: Pairs) -> None:
    labels: dict[str, Any] = {}
    for prompt, label in pairs:
        if prompt in labels:
            raise ContentError(
                f"--data.label_key: the prompt {shorten(prompt)} has two labels, {shorten(labels[prompt])} and "
                f"{shorten(label)}, and a cache has one list of rewards a prompt. Drop one of the two, or the flag "
                "if the reward does not use labels"
            )
        labels[prompt] = label


def _fill(
    args: SimpleNamespace,
    writer: reward_cache.Writer,
    pairs: Pairs,
    tokenizer: Any,
    scored: columns.Scored | None,
) -> None:
    from tqdm import tqdm

    there = sum(prompt in writer.cache for prompt, _ in pairs)
    engines = 1 if scored else engine.count(args.vllm.tensor_parallel_size, args.vllm.num_engines)
    what = scored.what if scored else f"{args.cache.samples} samples of {args.actor.model_name_or_path}"
    print(
        f"bond cache: {len(pairs)} prompts x {what} into {writer.path}"
        + (f", by {engines} engines" if engines > 1 else "")
        + (f"; {there} prompts are there already" if there else ""),
        flush=True,
    )
    if there == len(pairs):
        return
    draw, score, chunk = (scored.draw, scored.score, 1) if scored else _sampler(args, pairs, tokenizer, engines)
    interactive = sys.stderr.isatty()
    total, count, progress = 0.0, 0, ""
    with tqdm(
        total=len(pairs),
        initial=there,
        unit="prompt",
        desc=flags.CACHE,
        mininterval=0.2 if interactive else 5.0,
        smoothing=0,  # prompts come in chunks: only the average over all of them says how long it takes
    ) as bar:

        def told(done: int, wanted: int) -> None:
            nonlocal progress
            if not progress:
                bar.unpause()  # the time left is of sampling, not of starting vLLM
            progress = f"{done}/{wanted} responses {'read' if scored else 'sampled'}"
            bar.set_postfix_str(progress, refresh=interactive)

        prompts = [prompt for prompt, _ in pairs]
        draw = functools.partial(draw, progress=told)
        rest = engine.remaining(prompts, lambda i: prompts[i] in writer.cache, draw, chunk)
        with contextlib.closing(rest):
            for i, samples in rest:
                prompt, label = pairs[i]
                rewards = score(prompt, label, samples)
                stored = None if samples.log_probs is None else (samples.response_ids, samples.log_probs)
                writer.append(prompt, rewards, samples.responses if args.cache.responses else None, label, stored)
                total, count = total + sum(rewards), count + len(rewards)
                bar.set_postfix_str(f"{progress}, mean reward {total / count:.4g}", refresh=False)
                bar.update()


def _sampler(
    args: SimpleNamespace, pairs: Pairs, tokenizer: Any, engines: int
) -> tuple[Callable[..., Generator[list[PromptSamples]]], scoring.Score, int]:
    """What samples the initial policy, what scores that, and how many prompts at a time."""
    width = args.vllm.tensor_parallel_size
    if (most := engine.count(width)) > engines:
        print(f"bond cache: --vllm.num_engines {most} would use all {len(engine.gpus())} GPUs", flush=True)
    share = -(-len(pairs) * args.cache.samples // engines)  # no engine without a chunk
    chunk = engine.chunk_of(args.cache.samples, args.cache.chunk, share)
    score = scoring.scorer(args, tokenizer)
    draw = functools.partial(
        engine.stream,
        args.actor.model_name_or_path,
        n=args.cache.samples,
        min_new_tokens=_min_new_tokens(args),
        seed=args.cache.seed,
        chunk=chunk,
        log_probs=args.cache.log_probs,
        **scoring.sampling(args, score, engines, width),
    )
    return draw, score, chunk

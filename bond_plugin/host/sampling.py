"""Rollouts: samples of the policy, and samples of the anchor or reference for the same prompts.

The engines hold one set of weights at a time. :class:`Engines` knows which, and asks the training workers to send
others when they are needed. Every sample has a seed of its own (:meth:`bond_plugin.host.state.State.seed`), so that a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import functools
import inspect
import pickle
import time
from typing import Any

import ray
import torch

from bond_plugin.host import flags, hooks, log_probs, metrics, plan, state, weights
from bond_plugin.host.rewards import Requests
from bond_plugin.offline import make_cache
from bond_plugin.offline.engine import prompt_tokens
from bond_plugin.offline.prompts import Pairs

#: Response tokens of a step, of source samples too: what two algorithms cost beside each other.
TOKENS = "rollout/generated_tokens"

_REQUESTS = 32  # samples in one call to an engine; all calls are made at once


class Engines:
    """The engines of a trainer whose algorithm draws source samples: which weights they hold, and how to change that.

    Attributes:
        holding: the weights' name.
        tokenizer: a reference of Ray.
    """

    def __init__(self, trainer: Any) -> None:
        self.actors = trainer.actor_model_group
        self.holding = "policy"
        self.tokenizer = ray.put(SharedTokenizer(trainer.tokenizer))

    def hold(self, name: str, timings: dict[str, float]) -> None:
        """Make the engines hold the weights ``name``, if they do not already; add the time that takes."""
        if self.holding == name:
            return
        started = time.time()
        ray.get([actor.__ray_call__.remote(weights.broadcast, name) for actor in self.actors._actor_handlers])
        self.holding = name
        timings[f"timing/sync_{name}"] = time.time() - started


class SharedTokenizer:
    """A tokenizer that each process unpickles once, however often it is an argument.

    It goes along with each call to an engine, and unpickling one with a vocabulary of 50,000 takes longer than
    sampling with a small model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._payload = pickle.dumps(tokenizer)

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return _unpickled, (self._payload,)


@functools.lru_cache(maxsize=4)
def _unpickled(payload: bytes) -> Any:
    return pickle.loads(payload)


# The trainer.


def trainer_init(original: Any, self: Any, strategy: Any, *args: Any, **kwargs: Any) -> None:
    """Put other weights' log-probabilities where the reference model's are; for source samples, keep
    :class:`Engines`.
    """
    original(self, strategy, *args, **kwargs)
    hooks.attach(self)
    kept = state.share(self)
    kept.log = metrics.MetricsFile(self.args)
    if self.wandb_logger:
        # The host ends the W&B run and not W&B's own process, which Ray then kills, whatever it has written by then.
        self.wandb_logger.close = self.wandb_logger.handle.teardown
    run = plan.of(self.args)
    if run.log_probs and not run.taught:
        self.experience_maker.initial_model_group = log_probs.SLOT
    if run.algorithm is not None:
        # The host's way knows its own names; this one asks for nothing but returns, which our advantages replace.
        self.experience_maker.advantage_estimator = "reinforce"
    if run.needs.source_samples:
        kept.engines = Engines(self)


# The sampler.


def create_vllm_engines(original: Any, *args: Any, **kwargs: Any) -> Any:
    """The engines must report log-probabilities of the distribution they sample from, temperature included."""
    asked = flags.current()
    bound = inspect.signature(original).bind(*args, **kwargs)
    if asked is not None and asked.args is not None and plan.of(asked.args).needs.source_samples:
        bound.arguments["logprobs_mode"] = "processed_logprobs"
    return original(*bound.args, **bound.kwargs)


@torch.no_grad()
def generate_samples(original: Any, self: Any, **options: Any) -> tuple[list[Any], float | None, int, bool]:
    """One rollout batch: the host's, or of several weights.

    Returns:
        As the host's does: the policy's samples, the filter's pass rate, the number of prompts taken, and whether the
        prompts are exhausted.

    Raises:
        ValueError: there are too few prompts for one step.
    """
    kept, run, rollout = state.of(self), plan.of(self.args), self.args.rollout
    ours = run.algorithm is not None
    if ours and len(self.prompts_dataloader) < rollout.batch_size:
        raise ValueError(
            f"--data.prompt_dataset has {len(self.prompts_dataloader)} prompts, fewer than one rollout of "
            f"--rollout.batch_size {rollout.batch_size}: nothing would be trained"
        )
    if not hasattr(self, "_dataloader_iter"):
        # The host's loader draws its order of prompts from a generator that no flag seeds, so that the order was
        # another one in each run. Here it is that of --train.seed. A resumed run's comes from its checkpoint.
        self.prompts_dataloader.sampler.generator.manual_seed(kept.seed("prompts"))
    kept.timings, kept.metrics = {}, {TOKENS: 0}
    if kept.engines is not None or run.needs.offline:
        samples, pass_rate, prompts, exhausted = _of_several(self, options)
    else:
        if ours:
            options["min_new_tokens"] = 0  # the policy may end at once: a sample is a sample of the policy
        samples, pass_rate, prompts, exhausted = original(self, **options)
        kept.metrics[TOKENS] = _tokens(samples)
    if ours and len(samples) < rollout.batch_size * rollout.n_samples_per_prompt:
        # What is left at the end of the data and fills no rollout is no step of ours.
        if samples or prompts:
            print(
                f"bond: at the end of the episode {prompts} prompts and {len(samples)} samples are left, fewer than "
                f"--rollout.batch_size {rollout.batch_size} x --rollout.n_samples_per_prompt "
                f"{rollout.n_samples_per_prompt}, and are not used",
                flush=True,
            )
        samples = []
    return samples, pass_rate, prompts, exhausted


def _of_several(sampler: Any, options: dict[str, Any]) -> tuple[list[Any], None, int, bool]:
    """n samples of the policy a prompt, or stored ones; the source samples, m a prompt, are put into the state."""
    from openrlhf.trainer.ppo_utils.samples_generator import _collect_prompt_batch

    args, kept, needs = sampler.args, state.of(sampler), plan.of(sampler.args).needs
    if getattr(sampler, "_dataloader_iter", None) is None:
        sampler._dataloader_iter = iter(sampler.prompts_dataloader)
    prompts, labels, _images, exhausted = _collect_prompt_batch(sampler._dataloader_iter, args.rollout.batch_size)
    if len(prompts) < args.rollout.batch_size:
        sampler._dataloader_iter = None
        return [], None, len(prompts), True

    pairs = list(zip(prompts, labels, strict=True))

    def draw(name: str, count: int) -> list[Any]:
        if name == "stored":
            return _stored(sampler, count, pairs, options)
        kept.engines.hold(name, kept.timings)
        return _draw(sampler, name, count, pairs, options)

    samples = draw("stored" if needs.offline else "policy", args.rollout.n_samples_per_prompt)
    if needs.source_samples:
        kept.source_samples = draw(needs.source, needs.source_samples)
    return samples, None, len(prompts), exhausted


def _draw(sampler: Any, source: str, count: int, pairs: Pairs, options: dict[str, Any]) -> list[Any]:
    """``count`` samples for each prompt from what the engines hold, in the order of the prompts."""
    from tqdm import tqdm
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kept = state.of(sampler)
    started = time.time()
    params = SamplingParams(
        temperature=options.get("temperature", 1.0),
        top_p=options.get("top_p", 1.0),
        top_k=-1,
        max_tokens=options.get("max_new_tokens"),
        min_tokens=0,  # the policy may end at once: a sample is a sample of the policy
        skip_special_tokens=False,
        logprobs=0,  # of the sampled token alone
        output_kind=RequestOutputKind.FINAL_ONLY,  # nobody reads along: no message for every token
    )
    calls = []
    for e, engine in enumerate(sampler.vllm_engines):
        # All samples of a prompt go to one engine, where they can share its prefix.
        places = [(i, j) for i in range(e, len(pairs), len(sampler.vllm_engines)) for j in range(count)]
        for start in range(0, len(places), _REQUESTS):
            part = places[start : start + _REQUESTS]
            ref = engine.generate_responses.remote(
                prompt=Requests((*pairs[i], kept.seed(source, i, j)) for i, j in part),
                label=None,
                sampling_params=params,
                max_length=options.get("max_len", 2048),
                hf_tokenizer=kept.engines.tokenizer,
                num_samples=1,
            )
            calls.append((ref, part))
    drawn = {}
    with tqdm(total=len(pairs) * count, desc=f"Generate {source} samples") as progress:
        for ref, part in calls:
            (responses,) = ray.get(ref)
            for place, response in zip(part, responses, strict=True):
                drawn[place] = sampler._process_response_into_experience(response, **options)
            progress.update(len(part))
    samples = [drawn[i, j] for i in range(len(pairs)) for j in range(count)]
    kept.timings[f"timing/generate_{source}"] = time.time() - started
    kept.metrics[TOKENS] += _tokens(samples)
    return samples


def _stored(sampler: Any, count: int, pairs: Pairs, options: dict[str, Any]) -> list[Any]:
    """``count`` of the reward cache's responses for each prompt, others at each step, in the order of the prompts."""
    generator, tokenizer = state.of(sampler).generator("stored"), sampler.tokenizer
    samples = []
    for prompt, label in pairs:
        before, _ = prompt_tokens(tokenizer, prompt, options.get("max_new_tokens"), options.get("max_len"))
        there = make_cache.of(sampler.args).stored(prompt)
        for place in torch.randperm(len(there), generator=generator)[:count].tolist():
            one = there[place]
            response = {
                "prompt": prompt,
                "label": label,
                "observation_tokens": [*before, *one.tokens],
                "action_ranges": [(len(before), len(before) + len(one.tokens))],
                "rollout_log_probs": [0.0] * len(before) + one.log_probs,
                "truncated": one.tokens[-1] != tokenizer.eos_token_id,
                "reward": one.reward,
                "scores": one.reward,
            }
            samples.append(sampler._process_response_into_experience(response, **options))
    return samples


def _tokens(samples: list[Any]) -> int:
    """Response tokens, EOS included."""
    return int(sum(sample.action_mask.sum().item() for sample in samples))

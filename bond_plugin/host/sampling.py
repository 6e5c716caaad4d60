"""Rollouts: samples of the policy, and samples of the anchor or reference for the same prompts.

The engines hold one set of weights at a time. :class:`Engines` knows which, and asks the training workers to send
others when they are needed. Every sample has a seed of its own (:meth:`bond_plugin.host.state.State.seed`), so that a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from typing import Any

import ray
import torch

from bond_plugin.host import flags, hooks, log_probs, metrics, plan, state, weights
from bond_plugin.host.rewards import Requests
from bond_plugin.offline import make_cache
from bond_plugin.offline.engine import prompt_tokens

#: Response tokens of a step, of source samples too: what two algorithms cost beside each other.
TOKENS = "rollout/generated_tokens"

_REQUESTS = 32  # samples in one call to an engine; all calls are made at once


class Rollout(list):
    """What the sampler hands to the experience maker: the policy's samples, prompt by prompt.

    The list itself holds the policy's samples, n a prompt; ``source_samples`` the others, m a prompt.
    """

    def __init__(self, samples: list[Any], source_samples: list[Any]) -> None:
        super().__init__(samples)
        self.source_samples = source_samples


class Engines:
    """The engines of a trainer whose algorithm draws source samples: which weights they hold, and how to change that.

    Attributes:
        algorithm: see there.
        holding: the weights' name.
        tokenizer: a reference of Ray.
    """

    def __init__(self, trainer: Any, algorithm: Any) -> None:
        self.algorithm = algorithm
        self.actors = trainer.actor_model_group
        self.holding = "policy"
        self.tokenizer = ray.put(SharedTokenizer(trainer.tokenizer))

    def hold(self, name: str, timings: dict[str, float]) -> None:
        """Make the engines hold the weights ``name``, if they do not already; add the time that takes."""
        if self.holding == name:
            return
        started = time.time()
        self.holding = "unknown"  # until all have arrived
        ray.get([actor.__ray_call__.remote(weights.broadcast, name) for actor in self.actors._actor_handlers])
        self.holding = name
        timings[f"timing/sync_{name}"] = time.time() - started


class SharedTokenizer:
    """A tokenizer that each process unpickles once, however often it is an argument.

    Every sample is a call to an engine with the tokenizer among its arguments, and unpickling one with a
    vocabulary of 50,000 takes longer than sampling with a small model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._payload = pickle.dumps(tokenizer)
        self._key = hashlib.sha256(self._payload).hexdigest()

    def __reduce__(self) -> tuple[Any, tuple[str, bytes]]:
        return _restore_tokenizer, (self._key, self._payload)


_tokenizers: dict[str, Any] = {}


def _restore_tokenizer(key: str, payload: bytes) -> Any:
    if key not in _tokenizers:
        _tokenizers[key] = pickle.loads(payload)
    return _tokenizers[key]


# The trainer.


def trainer_init(original: Any, self: Any, strategy: Any, *args: Any, **kwargs: Any) -> None:
    """Put other weights' log-probabilities where the reference model's are; for source samples, keep
    :class:`Engines`.
    """
    original(self, strategy, *args, **kwargs)
    hooks.attach(self, "openrlhf.trainer.ppo_trainer:BasePPOTrainer")
    kept = state.share(self)
    kept.log = metrics.MetricsFile(self.args)
    run = plan.of(self.args)
    if run.log_probs and not run.taught:
        self.experience_maker.initial_model_group = log_probs.SLOT
    if run.algorithm is None:
        return
    # The host's way to advantages knows its own names; this one asks for nothing but returns, which ours replace.
    self.experience_maker.advantage_estimator = "reinforce"
    loader = getattr(self, "prompts_dataloader", None)  # elsewhere in an asynchronous run
    if loader is not None and len(loader) < self.args.rollout.batch_size:
        raise ValueError(_too_few(len(loader), self.args))
    if run.needs.source_samples:
        kept.engines = Engines(self, run.algorithm)


# The sampler.


def create_vllm_engines(original: Any, *args: Any, **kwargs: Any) -> Any:
    """The engines must report log-probabilities of the distribution they sample from, temperature included."""
    asked = flags.current()
    if asked is not None and asked.args is not None and plan.of(asked.args).needs.source_samples:
        import inspect

        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.arguments["logprobs_mode"] = "processed_logprobs"
        return original(*bound.args, **bound.kwargs)
    return original(*args, **kwargs)


@torch.no_grad()
def generate_samples(original: Any, self: Any, **generate_kwargs: Any) -> Any:
    """One rollout batch: the host's, or n samples of the policy and m source samples for each prompt.

    Returns, as the host's does: the samples, the filter's pass rate (none here), the number of prompts
    taken, and whether the prompts are exhausted.
    """
    kept = state.of(self)
    kept.timings = {}
    needs = plan.of(self.args).needs
    if kept.engines is None and not needs.offline:
        return _of_the_policy(original, self, generate_kwargs)
    from openrlhf.trainer.ppo_utils.samples_generator import _collect_prompt_batch

    if getattr(self, "_dataloader_iter", None) is None:
        # The host's loader draws its order from a generator that no flag seeds. Here it depends on the seed and
        # on the step at which the episode begins, so that a resumed run has it too.
        self.prompts_dataloader.sampler.generator.manual_seed(kept.seed("prompts"))
        self._dataloader_iter = iter(self.prompts_dataloader)
    wanted = self.args.rollout.batch_size
    prompts, labels, _images, exhausted = _collect_prompt_batch(self._dataloader_iter, wanted)
    if len(prompts) < wanted:
        self._dataloader_iter = None
        if prompts:
            print(
                f"bond: the last {len(prompts)} prompts of the episode are fewer than --rollout.batch_size "
                f"{wanted} and are not used",
                flush=True,
            )
        return [], None, len(prompts), True

    kept.metrics = {TOKENS: 0}

    def draw(name: str, count: int) -> list[Any]:
        if name == "stored":
            return _stored(self, count, prompts, labels, generate_kwargs)
        kept.engines.hold(name, kept.timings)
        return _draw(self, name, count, prompts, labels, generate_kwargs)

    samples = draw("stored" if needs.offline else "policy", self.args.rollout.n_samples_per_prompt)
    if needs.source_samples:
        samples = Rollout(samples, draw(needs.source, needs.source_samples))
    return samples, None, len(prompts), exhausted


def _of_the_policy(original: Any, self: Any, options: dict[str, Any]) -> Any:
    """The host's own rollout. What is left at the end of the data and fills no rollout is no step of ours."""
    ours = plan.of(self.args).algorithm is not None
    if ours:
        options = {**options, "min_new_tokens": 0}  # the policy may end at once: a sample is a sample of the policy
    samples, pass_rate, prompts, exhausted = original(self, **options)
    state.of(self).metrics = {TOKENS: _tokens(samples)}
    wanted = self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt
    if ours and len(samples) < wanted:
        if len(self.prompts_dataloader) < self.args.rollout.batch_size:  # an asynchronous run has it only here
            raise ValueError(_too_few(len(self.prompts_dataloader), self.args))
        if samples or prompts:
            print(
                f"bond: {len(samples)} samples are left at the end of the episode, fewer than --rollout.batch_size x "
                f"--rollout.n_samples_per_prompt = {wanted}, and are not used",
                flush=True,
            )
        samples = []
    return samples, pass_rate, prompts, exhausted


def _too_few(prompts: int, args: Any) -> str:
    return (
        f"--data.prompt_dataset has {prompts} prompts, fewer than one rollout of --rollout.batch_size "
        f"{args.rollout.batch_size}: nothing would be trained"
    )


def _draw(
    sampler: Any, source: str, count: int, prompts: list[str], labels: list[Any], options: dict[str, Any]
) -> list[Any]:
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
        places = [(i, j) for i in range(e, len(prompts), len(sampler.vllm_engines)) for j in range(count)]
        for start in range(0, len(places), _REQUESTS):
            part = places[start : start + _REQUESTS]
            ref = engine.generate_responses.remote(
                prompt=Requests(
                    prompts=[prompts[i] for i, _ in part],
                    labels=[labels[i] for i, _ in part],
                    seeds=[kept.seed(source, i, j) for i, j in part],
                ),
                label=None,
                sampling_params=params,
                max_length=options.get("max_len", 2048),
                hf_tokenizer=kept.engines.tokenizer,
                num_samples=1,
            )
            calls.append((ref, part))
    drawn = {}
    with tqdm(total=len(prompts) * count, desc=f"Generate {source} samples") as progress:
        for ref, part in calls:
            (responses,) = ray.get(ref)
            for place, response in zip(part, responses, strict=True):
                drawn[place] = sampler._process_response_into_experience(response, **options)
            progress.update(len(part))
    samples = [drawn[i, j] for i in range(len(prompts)) for j in range(count)]
    kept.timings[f"timing/generate_{source}"] = time.time() - started
    kept.metrics[TOKENS] += _tokens(samples)
    return samples


def _stored(sampler: Any, count: int, prompts: list[str], labels: list[Any], options: dict[str, Any]) -> list[Any]:
    """``count`` of the reward cache's responses for each prompt, others at each step, in the order of the prompts."""
    generator, tokenizer = state.of(sampler).generator("stored"), sampler.tokenizer
    samples = []
    for prompt, label in zip(prompts, labels, strict=True):
        before, _ = prompt_tokens(tokenizer, prompt, options.get("max_new_tokens"), options.get("max_len"))
        there = make_cache.stored_for(sampler.args, prompt)
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

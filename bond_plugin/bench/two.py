"""Two models on held-out prompts, for ``bond evaluate``: what ``bond bench`` measures, said in one table.

The prompts are the population: every interval is a bootstrap over prompts of one value a prompt, which is itself an
average over samples.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bond_plugin.bench.resampling import Estimate, Resampling
from bond_plugin.bestofn.distribution import bon_kl_bound
from bond_plugin.bestofn.estimates import expected_max
from bond_plugin.files import ContentError, read_json, write_json
from bond_plugin.offline import engine, fingerprints, likelihood, scoring
from bond_plugin.offline.measure import Scored, measure, read_samples, save_samples
from bond_plugin.offline.prompts import Pairs

#: The N of the Best-of-N levels that are reported, as far as there are samples for them.
BEST_OF = (2, 4, 8, 16)

_SPOT_CHECKS = 4
_EXAMPLES = 4

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How both models are sampled.

    Attributes:
        samples: a prompt from each model, at least 1.
        max_new_tokens: the length at which responses are cut off.
        temperature: of the sampling, and of the distributions whose KL is computed.
        kl_samples: samples a prompt of ``after`` on which the KL is computed, 1 to ``samples``.
        seed: of the sampling; ``after`` is sampled with ``seed + 1``, so that the two are independent.
        max_len: tokens of prompt and response together, as in training; ``None`` cuts no prompt.
    """

    samples: int = 16
    max_new_tokens: int = 32
    temperature: float = 1.0
    kl_samples: int = 2
    seed: int = 0
    max_len: int | None = None


@dataclass(frozen=True)
class BeforeAfter:
    """The result of :meth:`Evaluation.of`.

    Attributes:
        before, after: the two models' folders.
        prompts: how many.
        sampling: what both were sampled with.
        reward_before, reward_after: mean reward.
        gain: reward of ``after`` minus reward of ``before``, prompt by prompt.
        win_rate: share of the pairs of samples of a prompt in which ``after`` has the higher reward, a tie
            counting one half; in [0, 1].
        kl: KL(after || before) of whole responses, in nats.
        best_of: N to the mean reward of Best-of-N of ``before``.
        length_before, length_after: mean response length in tokens, EOS included.
        examples: a few prompts, each with one sample of either model and their rewards.
    """

    before: str
    after: str
    prompts: int
    sampling: Sampling
    reward_before: Estimate
    reward_after: Estimate
    gain: Estimate
    win_rate: Estimate
    kl: Estimate
    best_of: dict[int, Estimate]
    length_before: float
    length_after: float
    examples: list[dict[str, Any]]

    def to_json(self) -> str:
        """The result as a JSON object, indented; the keys of ``best_of`` become strings."""

        def plain(estimate: Estimate) -> dict[str, float]:
            return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}

        found = dict(vars(self))
        return json.dumps(found | asdict(found.pop("sampling")), indent=2, ensure_ascii=False, default=plain)


@dataclass(frozen=True)
class Evaluation:
    """How two models are compared.

    Attributes:
        pairs: held-out prompts, templates applied, and a label each.
        score: the reward.
        reward: its :func:`~bond_plugin.offline.scoring.identity`.
        sampling: how.
        cache: folder where samples and rewards are kept, so that a second call with the same models and settings
            reuses them.
        say: takes progress messages.
        engines: vLLM engines that sample side by side.
        tensor_parallel_size: GPUs of each.
    """

    pairs: Pairs
    score: scoring.Score
    reward: Any
    sampling: Sampling
    cache: Path
    say: Say
    engines: int = 1
    tensor_parallel_size: int = 1

    def of(self, before: str | Path, after: str | Path) -> BeforeAfter:
        """Sample both models on the same prompts, score the samples, and compute the KL between the models.

        Args:
            before: folder of the initial policy.
            after: folder of the trained policy; the same tokenizer and vocabulary.

        Raises:
            VocabularyError, TokenizerError: the models cannot be compared.
            RewardError: the reward failed.
            SamplingError: vLLM failed.
        """
        pairs, sampling = self.pairs, self.sampling
        self.cache.mkdir(parents=True, exist_ok=True)
        first = self.scored("before", before, sampling.seed)
        second = self.scored("after", after, sampling.seed + 1)
        self.say(f"KL: {len(pairs) * sampling.kl_samples} responses of the trained policy under both models")
        found = measure(
            likelihood.load(after, before),
            second,
            first,
            samples=sampling.samples,
            quantile_samples=sampling.samples,
            kl_samples=sampling.kl_samples,
            temperature=sampling.temperature,
            progress=engine.ticker(self.say, "KL"),
        )
        resampling, levels = Resampling(len(pairs)), [n for n in BEST_OF if n <= sampling.samples]

        def estimate(values: Tensor) -> Estimate:
            return Estimate.of(resampling.mean(values.unsqueeze(-1)).squeeze(-1))

        reward_before = first.rewards.mean(dim=-1)
        return BeforeAfter(
            before=os.fspath(before),
            after=os.fspath(after),
            prompts=len(pairs),
            sampling=sampling,
            reward_before=estimate(reward_before),
            reward_after=estimate(found["reward"]),
            gain=estimate(found["reward"] - reward_before),
            win_rate=estimate(found["win_rate"]),
            kl=estimate(found["kl"]),
            best_of={n: estimate(expected_max(first.rewards, n)) for n in levels},
            length_before=sum(len(ids) for one in first.samples for ids in one.response_ids) / first.rewards.numel(),
            length_after=found["length"].mean().item(),
            examples=[
                {
                    "prompt": pairs[i][0],
                    "before": first.samples[i].queries[0],
                    "reward_before": first.rewards[i, 0].item(),
                    "after": second.samples[i].queries[0],
                    "reward_after": second.rewards[i, 0].item(),
                }
                for i in range(min(_EXAMPLES, len(pairs)))
            ],
        )

    def scored(self, name: str, model: str | Path, seed: int) -> Scored:
        settings = {**asdict(self.sampling), "kl_samples": None, "seed": seed}
        key: list[Any] = [fingerprints.of_model(model), fingerprints.of_tokenizer(model), settings]
        key.append([prompt for prompt, _ in self.pairs])
        samples = self.samples(name, model, self.cache / f"samples-{name}-{fingerprints.of_value(key)}.json", seed)
        key += [self.reward, self.pairs]
        return Scored(
            samples, self.rewards(name, samples, self.cache / f"rewards-{name}-{fingerprints.of_value(key)}.json")
        )

    def samples(self, name: str, model: str | Path, path: Path, seed: int) -> list[engine.PromptSamples]:
        kept = read_samples(path)
        if kept is not None:
            self.say(f"{name}: samples reused from {path}")
            return kept[0]
        prompts, count = [prompt for prompt, _ in self.pairs], self.sampling.samples
        by = f" by {self.engines} engines" if self.engines > 1 else ""
        self.say(f"{name}: sampling {len(prompts)} prompts x {count} from {model}{by} (vLLM starts first)")
        started = time.monotonic()
        how = {key: getattr(self.sampling, key) for key in ("max_new_tokens", "max_len", "temperature")}
        drawn = engine.sample(
            model,
            prompts,
            count,
            seed=seed,
            engines=self.engines,
            tensor_parallel_size=self.tensor_parallel_size,
            engine=scoring.room_beside(self.score, self.engines * self.tensor_parallel_size),
            progress=engine.ticker(self.say, name),
            **how,
        )
        tokens = sum(len(ids) for one in drawn for ids in one.response_ids)
        seconds = time.monotonic() - started
        self.say(f"{name}: {len(prompts) * count} responses, {tokens:,} tokens in {seconds:.0f} s")
        save_samples(path, drawn)
        return drawn

    def rewards(self, name: str, samples: list[engine.PromptSamples], path: Path) -> Tensor:
        """``[P, K]``. Kept rewards are used if they still hold for a few queries.

        A reward's content is part of the key; what it reads itself (a classifier, a server) cannot be.
        """
        kept = read_json(path, list)
        if kept is not None:
            values = self.kept(kept, path)
            if self.still_hold(values, samples):
                self.say(f"{name}: rewards reused from {path}")
                return values
            self.say(f"{name}: the reward gives other values than before; scoring again")
        started = time.monotonic()
        values = scoring.rewards(self.score, self.pairs, samples)
        seconds = time.monotonic() - started
        self.say(f"{name}: {values.numel()} rewards in {seconds:.0f} s, mean {values.mean().item():.3f}")
        write_json(path, values.tolist())
        return values

    def kept(self, values: list[Any], path: Path) -> Tensor:
        """``[P, K]`` of what was kept.

        Raises:
            ContentError: it is something else.
        """
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            found = torch.tensor(values, dtype=torch.float64)
            if found.shape == (len(self.pairs), self.sampling.samples) and found.isfinite().all():
                return found
        raise ContentError(f"{path} has no {self.sampling.samples} finite rewards for each prompt; remove it")

    def still_hold(self, values: Tensor, samples: list[engine.PromptSamples]) -> bool:
        for place in range(0, values.numel(), max(1, values.numel() // _SPOT_CHECKS)):
            i, j = divmod(place, values.shape[-1])
            one = samples[i]
            alone = engine.PromptSamples(one.prompt_ids, [one.response_ids[j]], [one.queries[j]], [])
            again = scoring.rewards(self.score, [self.pairs[i]], [alone])
            if not torch.allclose(again, values[i, j], rtol=1e-6, atol=1e-9):
                return False
        return True


# What a reader sees.


def format_table(result: BeforeAfter) -> str:
    """The result as a plain text table of at most 80 columns, ending without a newline."""

    def row(name: str, reward: Estimate, kl: str, length: str) -> str:
        return f"{name:<18}{reward.value:>9.3f}   {_interval(reward):<20}{kl:<22}{length:>6}".rstrip()

    how = result.sampling
    kl = f"{result.kl.value:.2f} {_interval(result.kl, 2)}"
    best_of = [
        row(f"  its Best-of-{n}", level, f"at most {bon_kl_bound(n):.2f}", "") for n, level in result.best_of.items()
    ]
    return "\n".join(
        [
            f"{result.prompts} held-out prompts x {how.samples} samples, "
            f"at most {how.max_new_tokens} new tokens, temperature {how.temperature:g}",
            "",
            f"{'':<18}{'reward':>9}   {'95 % interval':<20}{'KL to initial, nats':<22}{'tokens':>6}",
            row("initial policy", result.reward_before, "0", f"{result.length_before:.1f}"),
            *best_of,
            row("trained policy", result.reward_after, kl, f"{result.length_after:.1f}"),
            "",
            f"{'gain':<18}{result.gain.value:>+9.3f}   {_interval(result.gain)}   prompt by prompt",
            f"{'win rate':<18}{result.win_rate.value:>9.3f}   {_interval(result.win_rate)}   "
            "trained against initial, ties 1/2",
            "",
            _verdict(result),
        ]
    )


def _interval(estimate: Estimate, digits: int = 3) -> str:
    return f"[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _verdict(result: BeforeAfter) -> str:
    if result.gain.low <= 0 <= result.gain.high:
        return "No difference in reward can be told from these samples."
    if result.gain.high < 0:
        return "The trained policy has less reward than the initial policy."
    levels = {1: result.reward_before, **result.best_of}
    reached = max(n for n, level in levels.items() if n == 1 or level.value <= result.reward_after.value)
    missed = [n for n in sorted(levels) if n > reached]
    below = "one sample" if reached == 1 else f"Best-of-{reached}"
    if not missed:
        return f"A trained sample is worth more than {below} of the initial policy."
    return f"A trained sample stands between {below} and Best-of-{missed[0]} of the initial policy."

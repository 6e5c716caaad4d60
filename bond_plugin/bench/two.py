"""Two models on held-out prompts, for ``bond evaluate``: what ``bond bench`` measures, said in one table.

The prompts are the population: every interval is a bootstrap over prompts of one value a prompt, which is itself an
average over samples.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bond_plugin.bench.measure import sample
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


@dataclass(frozen=True)
class Evaluation:
    """How two models are compared, by the command's flags.

    These are the models' folders ``before`` and ``after``, ``samples`` a prompt from each, ``kl_samples`` of them on
    which the KL is computed, ``seed`` (``after`` is sampled with the next one, so that the two are independent),
    ``engines``, and ``output_dir``, whose ``cache/`` keeps samples and rewards for a second call with them.
    """

    flags: Namespace
    pairs: Pairs  # held-out prompts, templates applied, and a label each
    score: scoring.Score
    args: SimpleNamespace  # the host's, as the training has them
    say: Callable[[str], None]  # takes progress messages

    def run(self) -> dict[str, Any]:
        """Sample both models on the same prompts, score the samples, and compute the KL between the models.

        Returns:
            What :func:`to_json` writes. Each an :class:`Estimate`: ``reward_before`` and ``reward_after``, the mean
            rewards; ``gain``, their difference prompt by prompt; ``win_rate``, the share of the pairs of samples of a
            prompt in which ``after`` has the higher reward, a tie counting one half; ``kl``, KL(after || before) of
            whole responses in nats; ``best_of``, N to the mean reward of Best-of-N of ``before``. Beside them mean
            lengths in tokens, EOS included; a few examples; and how both models were sampled.

        Raises:
            VocabularyError, TokenizerError: the models cannot be compared.
            RewardError: the reward failed.
            SamplingError: vLLM failed.
        """
        pairs, flags = self.pairs, self.flags
        first = self.scored("before", flags.before, flags.seed)
        second = self.scored("after", flags.after, flags.seed + 1)
        self.say(f"KL: {len(pairs) * flags.kl_samples} responses of the trained policy under both models")
        found = measure(
            likelihood.load(flags.after, flags.before),
            second,
            first,
            samples=flags.samples,
            quantile_samples=flags.samples,
            kl_samples=flags.kl_samples,
            temperature=self.args.rollout.temperature,
            progress=engine.ticker(self.say, "KL"),
        )
        reward_before = first.rewards.mean(dim=-1)
        values = {
            "reward_before": reward_before,
            "reward_after": found["reward"],
            "gain": found["reward"] - reward_before,
            "win_rate": found["win_rate"],
            "kl": found["kl"],
        }
        tokens = sum(len(ids) for one in first.samples for ids in one.response_ids)
        best_of = {n: expected_max(first.rewards, n) for n in BEST_OF if n <= flags.samples}
        mean = Resampling(len(pairs)).mean
        return {
            "before": str(flags.before),
            "after": str(flags.after),
            "prompts": len(pairs),
            **{key: Estimate.of(mean(value)) for key, value in values.items()},
            "best_of": {n: Estimate.of(mean(value)) for n, value in best_of.items()},
            "length_before": tokens / first.rewards.numel(),
            "length_after": found["length"].mean().item(),
            "examples": [
                {
                    "prompt": pairs[i][0],
                    "before": first.samples[i].queries[0],
                    "reward_before": first.rewards[i, 0].item(),
                    "after": second.samples[i].queries[0],
                    "reward_after": second.rewards[i, 0].item(),
                }
                for i in range(min(_EXAMPLES, len(pairs)))
            ],
            **self.sampling(),
            "kl_samples": flags.kl_samples,
            "seed": flags.seed,
        }

    def sampling(self) -> dict[str, Any]:
        """What both models are sampled with."""
        run = self.args.rollout
        settings = {"max_new_tokens": run.max_new_tokens, "temperature": run.temperature}
        return {"samples": self.flags.samples, **settings, "max_len": self.args.data.max_len}

    def scored(self, name: str, model: str | Path, seed: int) -> Scored:
        """Samples of a model and their rewards, each kept under the hash of what it depends on."""
        key: list[Any] = [fingerprints.of_model(model), fingerprints.of_tokenizer(model), self.sampling(), seed]
        key.append([prompt for prompt, _ in self.pairs])
        cache = self.flags.output_dir / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        samples = self.drawn(name, model, cache / f"samples-{name}-{fingerprints.of_value(key)}.json", seed)
        key += [scoring.identity(self.args), self.pairs]
        rewards = cache / f"rewards-{name}-{fingerprints.of_value(key)}.json"
        return Scored(samples, self.rewards(name, samples, rewards))

    def drawn(self, name: str, model: str | Path, path: Path, seed: int) -> list[engine.PromptSamples]:
        kept = read_samples(path)
        if kept is not None:
            self.say(f"{name}: samples reused from {path}")
            return kept[0]
        count, engines = self.flags.samples, self.flags.engines
        self.say(f"{name}: sampling {len(self.pairs)} prompts x {count} from {model} (vLLM starts first)")
        started, tick = time.monotonic(), engine.ticker(self.say, name)
        drawn = sample(self.args, model, self.pairs, self.score, count, seed, engines, tick)
        tokens, seconds = sum(len(ids) for one in drawn for ids in one.response_ids), time.monotonic() - started
        self.say(f"{name}: {len(drawn) * count} responses, {tokens:,} tokens in {seconds:.0f} s")
        save_samples(path, drawn)
        return drawn

    def rewards(self, name: str, samples: list[engine.PromptSamples], path: Path) -> Tensor:
        """``[P, K]``. Kept rewards are used if they still hold for a few queries.

        A reward's content is part of the key; what it reads itself (a classifier, a server) cannot be. Raises
        ContentError if what was kept is something else.
        """
        kept = read_json(path, list)
        if kept is not None:
            try:
                values = torch.tensor(kept, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                values = torch.tensor(0.0)
            if values.shape != (len(self.pairs), self.flags.samples) or not values.isfinite().all():
                raise ContentError(f"{path} has no {self.flags.samples} finite rewards for each prompt; remove it")
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


def to_json(result: dict[str, Any]) -> str:
    """The result as a JSON object, indented; the keys of ``best_of`` become strings."""

    def plain(estimate: Estimate) -> dict[str, float]:
        return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}

    return json.dumps(result, indent=2, ensure_ascii=False, default=plain)


def format_table(result: dict[str, Any]) -> str:
    """The result as a plain text table of at most 80 columns, ending without a newline."""

    def row(name: str, reward: Estimate, kl: str, length: str) -> str:
        return f"{name:<18}{reward.value:>9.3f}   {_interval(reward):<20}{kl:<22}{length:>6}".rstrip()

    kl = f"{result['kl'].value:.2f} {_interval(result['kl'], 2)}"
    best_of = [
        row(f"  its Best-of-{n}", level, f"at most {bon_kl_bound(n):.2f}", "")
        for n, level in result["best_of"].items()
    ]
    return "\n".join(
        [
            f"{result['prompts']} held-out prompts x {result['samples']} samples, "
            f"at most {result['max_new_tokens']} new tokens, temperature {result['temperature']:g}",
            "",
            f"{'':<18}{'reward':>9}   {'95 % interval':<20}{'KL to initial, nats':<22}{'tokens':>6}",
            row("initial policy", result["reward_before"], "0", f"{result['length_before']:.1f}"),
            *best_of,
            row("trained policy", result["reward_after"], kl, f"{result['length_after']:.1f}"),
            "",
            f"{'gain':<18}{result['gain'].value:>+9.3f}   {_interval(result['gain'])}   prompt by prompt",
            f"{'win rate':<18}{result['win_rate'].value:>9.3f}   {_interval(result['win_rate'])}   "
            "trained against initial, ties 1/2",
            "",
            _verdict(result),
        ]
    )


def _interval(estimate: Estimate, digits: int = 3) -> str:
    return f"[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _verdict(result: dict[str, Any]) -> str:
    if result["gain"].low <= 0 <= result["gain"].high:
        return "No difference in reward can be told from these samples."
    if result["gain"].high < 0:
        return "The trained policy has less reward than the initial policy."
    levels = {1: result["reward_before"], **result["best_of"]}
    reached = max(n for n, level in levels.items() if n == 1 or level.value <= result["reward_after"].value)
    missed = [n for n in sorted(levels) if n > reached]
    below = "one sample" if reached == 1 else f"Best-of-{reached}"
    if not missed:
        return f"A trained sample is worth more than {below} of the initial policy."
    return f"A trained sample stands between {below} and Best-of-{missed[0]} of the initial policy."

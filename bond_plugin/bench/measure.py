"""A policy on held-out prompts: reward, KL to the reference and to Best-of-N of it, quantiles, win rate, diversity.

Runs in a process of its own (``python -m bond_plugin.bench.measure JOB.json``), since it needs torch, transformers
and vLLM, and what they hold is given back when it ends. The reference is measured first: its samples are what every
policy is compared with, and are kept in ``reference-samples.json`` beside ``reference.json``.

The estimates, for a prompt x, samples y_1..y_K of the policy π and q reference samples with rewards r'_1..r'_q:

- KL(π || π_ref): Rao-Blackwellised, whole next-token distributions along y_1..y_K (:mod:`bond_plugin.likelihood`).
- quantile: p_< + (p_<= - p_<) / 2 of r(y) among r'; log quantile: log p_<= with y itself counted among them, so that
  it is finite (arXiv 2407.14622, Figure 2 shows the expected log quantile).
- KL(π || π_BoN) = KL(π || π_ref) - E_π[log π_BoN / π_ref], the ratio by Theorem 1 with term (B) and quantiles among
  r' with y counted. This is the paper's estimate, and is biased as theirs: with q samples nothing below 1 / (q + 1)
  can be told, so the KL of a policy that is often below all of them is underestimated.
- KL(π_BoN || π) = E_BoN[log π_BoN / π_ref + log π_ref - log π] over Best-of-N samples drawn from reference samples
  other than r'.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bond_plugin.cache import cached_responses
from bond_plugin.files import write_whole
from bond_plugin.host.engine import Samples

if TYPE_CHECKING:
    from torch import Tensor

DIGITS = 5
"""Significant digits in the files: what is more is noise."""


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        model: the policy's folder; the reference's own for the reference.
        reference: the reference's folder.
        output: the JSON file to write.
        reference_samples: where the reference's samples are kept, written when the reference is measured.
        prompts, labels: held-out prompts, and a label each (or none).
        configuration: the host's nested arguments of the training runs, as ``bond train --dry-run`` prints them:
            the reward, the longest response and the temperature are those of training.
        evaluation: the fields of :class:`bond_plugin.bench.matrix.Evaluation`.
        is_reference: measure the reference and keep its samples.
    """

    model: str
    reference: str
    output: str
    reference_samples: str
    prompts: list[str]
    labels: list[Any] | None
    configuration: dict[str, Any]
    evaluation: dict[str, Any]
    is_reference: bool

    @property
    def max_new_tokens(self) -> int:
        return self.configuration["rollout"]["max_new_tokens"]

    @property
    def temperature(self) -> float:
        return self.configuration["rollout"]["temperature"]

    @property
    def seed(self) -> int:
        """The reference has another one: a policy that is close to it would draw the same responses."""
        return self.evaluation["seed"] + self.is_reference


def run(job: Job) -> None:
    """Sample, score, measure, and write ``job.output``.

    Raises:
        RewardError, SamplingError: as they say.
    """
    from bond_plugin.host import engine

    started = time.monotonic()
    settings = job.evaluation
    count = settings["reference_samples" if job.is_reference else "samples"]
    score, tokenizer = scorer(job)
    if job.is_reference:  # what the reward misses shows before minutes of sampling
        ids = tokenizer(job.prompts[0], add_special_tokens=False)["input_ids"]
        nothing = Samples([ids], [[[]]], [[job.prompts[0]]])
        scores(score, job.prompts[:1], None if job.labels is None else job.labels[:1], nothing)
    drawn = engine.sample(job.model, job.prompts, count, job.max_new_tokens, job.temperature, job.seed)
    rewards = scores(score, job.prompts, job.labels, drawn)
    if job.is_reference:
        write_json(Path(job.reference_samples), {**vars(drawn), "rewards": rewards.tolist()})
    kept = json.loads(Path(job.reference_samples).read_text())
    found = evaluate(job, drawn, rewards, kept)
    found["seconds"] = round(time.monotonic() - started, 1)
    found["generated_tokens"] = sum(len(ids) for one in drawn.response_ids for ids in one)
    if cache := job.configuration.get("bond", {}).get("reward_cache"):
        texts = tokenizer(cached_responses(cache), add_special_tokens=False)["input_ids"]
        found["cached_tokens"] = sum(len(ids) for ids in texts)
    write_json(Path(job.output), found)


def scorer(job: Job) -> tuple[Any, Any]:
    """The reward of the training runs, and the policy's tokenizer."""
    from bond_plugin.host import caching

    args = _namespace({**job.configuration, "actor": {**job.configuration["actor"], "model_name_or_path": job.model}})
    tokenizer = caching.tokenizer_of(args)
    return caching.scorer(args, tokenizer), tokenizer


def scores(score: Any, prompts: Sequence[str], labels: Sequence[Any] | None, drawn: Samples) -> Tensor:
    """The rewards of samples, ``[prompts, samples]`` float64.

    Raises:
        RewardError: the reward failed, or one is not finite.
    """
    import torch

    from bond_plugin.host import engine
    from bond_plugin.host.rewards import RewardError

    labels = labels if labels is not None else [""] * len(prompts)
    rows = []
    for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
        one = engine.PromptSamples(drawn.prompt_ids[i], drawn.response_ids[i], drawn.queries[i], [])
        values = score(prompt, label, one)
        if not all(value == value and abs(value) != float("inf") for value in values):
            raise RewardError(f"the reward of a response to {prompt!r} is not finite: {values}")
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def evaluate(job: Job, drawn: Samples, rewards: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
    """All numbers of one policy; see ``bond_plugin.bench.results`` for the keys.

    Args:
        drawn: samples of the policy; the first ``evaluation.samples`` of each prompt are used.
        rewards: ``[P, K]``, theirs.
        kept: the reference's samples: ``prompt_ids``, ``response_ids`` and ``rewards``.
    """
    import torch

    from bond_plugin import likelihood
    from bond_plugin.bestofn.distribution import log_bon_ratio, quantiles
    from bond_plugin.bestofn.estimates import pass_at_n, win_rate

    settings = job.evaluation
    if drawn.prompt_ids != kept["prompt_ids"]:
        raise ValueError(f"{job.model} and {job.reference} tokenize the prompts differently: a KL would mean nothing")
    used = min(settings["samples"], rewards.shape[-1])
    all_rewards, rewards = rewards, rewards[:, :used]
    responses = [ids[:used] for ids in drawn.response_ids]
    models = likelihood.load(job.model) if job.is_reference else likelihood.load(job.model, job.reference)
    own = likelihood.measure(models, drawn.prompt_ids, responses, job.temperature)

    reference = torch.tensor(kept["rewards"], dtype=torch.float64)
    q = settings["quantile_samples"]
    if job.is_reference:  # its own samples are not to be compared with themselves
        among, against = reference[:, -q:], reference[:, used:]
    else:
        among, against = reference[:, :q], reference
    p_lt, p_le = quantiles(rewards, among)
    q_lt, q_le = quantiles(rewards, among, include_self=True)
    found: dict[str, Any] = {
        "reward": rewards.mean(-1),
        "win_rate": win_rate(rewards, against),
        "kl": own.kl.mean(-1),
        "quantile": ((p_lt + p_le) / 2).mean(-1),
        "log_quantile": q_le.log().mean(-1),
        "entropy": own.entropy.mean(-1),
        "length": torch.tensor([[float(len(ids)) for ids in one] for one in responses]).mean(-1),
        "backward_kl": {},
        "forward_kl": {},
    }
    drawn_best = best_of_reference(reference, q, settings["bon_levels"], settings["forward_samples"])
    for n, places in drawn_best.items():
        found["backward_kl"][str(n)] = found["kl"] - log_bon_ratio(q_lt, q_le, n).mean(-1)
        best = [[kept["response_ids"][i][j] for j in row] for i, row in enumerate(places.tolist())]
        logs = likelihood.measure(models, drawn.prompt_ids, best, job.temperature).log_probs
        b_lt, b_le = quantiles(reference.gather(-1, places), reference[:, :q], include_self=True)
        found["forward_kl"][str(n)] = (log_bon_ratio(b_lt, b_le, n) + logs[-1] - logs[0]).mean(-1)
    result: dict[str, Any] = {key: _plain(value) for key, value in found.items()}
    for n in (1, 2):
        result[f"distinct_{n}"] = round(distinct(responses, n), DIGITS)
    if ((all_rewards == 0) | (all_rewards == 1)).all():
        sizes = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= all_rewards.shape[-1]]
        result["pass_at"] = {str(k): _plain(pass_at_n(all_rewards, k)) for k in sizes}
    result["examples"] = [
        {
            "prompt": job.prompts[i],
            "response": drawn.queries[i][0][len(job.prompts[i]) :],
            "reward": round(rewards[i, 0].item(), 4),
        }
        for i in range(min(settings["examples"], len(job.prompts)))
    ]
    return result


def best_of_reference(rewards: Tensor, skip: int, levels: Sequence[int], samples: int) -> dict[int, Tensor]:
    """Places of Best-of-N samples among the reference's: the best of each of ``samples`` groups of N.

    Groups do not overlap, and leave the first ``skip`` samples of a prompt out. Samples are exchangeable, so the
    first of equals is as good a choice as any.

    Args:
        rewards: ``[P, M]``, M at least skip + samples * max(levels).

    Returns:
        N to ``[P, samples]`` of indices below M.
    """
    import torch

    found = {}
    for n in levels:
        group = rewards[:, skip : skip + samples * n].reshape(rewards.shape[0], samples, n)
        found[n] = skip + torch.arange(samples) * n + group.argmax(-1)
    return found


def distinct(responses: Sequence[Sequence[Sequence[int]]], n: int) -> float:
    """Distinct-n: the share of different n-grams among all of a prompt's responses, averaged over prompts."""
    shares = []
    for of_prompt in responses:
        grams = [tuple(ids[i : i + n]) for ids in of_prompt for i in range(len(ids) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def _namespace(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{key: _namespace(one) for key, one in value.items()})
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [float(f"{one:.{DIGITS}g}") for one in value.tolist()]


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(value, ensure_ascii=False))


def main(argv: list[str]) -> int:
    """Measure what the file ``argv[0]`` describes. Returns the exit status."""
    run(Job(**json.loads(Path(argv[0]).read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

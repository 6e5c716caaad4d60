"""The numbers of a policy on held-out prompts: reward, win rate, KL to the reference and to Best-of-N, diversity.

The estimates, for a prompt x, samples y_1..y_K of the policy π and q reference samples with rewards r'_1..r'_q:

- KL(π || π_ref): Rao-Blackwellised, see :mod:`bond_plugin.offline.likelihood`.
- quantile: p_< + (p_<= - p_<) / 2 of r(y) among r'; log quantile: log p_<= with y itself counted among them, so that
  it is finite (arXiv 2407.14622, Figure 2 shows the expected log quantile).
- KL(π || π_BoN) = KL(π || π_ref) - E_π[log π_BoN / π_ref], the ratio by Theorem 1 with term (B) and quantiles among
  r' with y counted: the paper's estimate, biased as theirs, as nothing below 1 / (q + 1) can be told.
- KL(π_BoN || π) = E_BoN[log π_BoN / π_ref + log π_ref - log π] over Best-of-N samples drawn from reference samples
  other than r'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator
from typing_extensions import Self

from bond_plugin.files import write_json
from bond_plugin.offline.engine import PromptSamples
from bond_plugin.schema import Open, read_model

if TYPE_CHECKING:
    from torch import Tensor

_COLUMNS = ("prompt_ids", "response_ids", "queries")


class TokenizerError(ValueError):
    """Two models read the prompts as different tokens: a KL between them would mean nothing."""


@dataclass(frozen=True)
class Scored:
    """K samples of a policy for each of P prompts, and their rewards, ``[P, K]`` float64."""

    samples: list[PromptSamples]
    rewards: Tensor


def save_samples(path: Path, samples: Sequence[PromptSamples], **more: Any) -> None:
    """Keep samples, and ``more`` beside them, in a JSON file."""
    write_json(path, {column: [getattr(one, column) for one in samples] for column in _COLUMNS} | more)


def read_samples(path: Path) -> tuple[list[PromptSamples], dict[str, Any]] | None:
    """What :func:`save_samples` kept, or ``None`` if there is no such file; the responses' texts are not kept."""
    found = read_model(path, _Samples)
    if found is None:
        return None
    columns = [getattr(found, column) for column in _COLUMNS]
    return [PromptSamples(*one, responses=[]) for one in zip(*columns, strict=True)], found.model_extra or {}


class _Samples(Open):
    prompt_ids: list[list[int]]
    response_ids: list[list[list[int]]]
    queries: list[list[str]]

    @model_validator(mode="after")
    def _of_the_same_responses(self) -> Self:
        shapes = [[len(texts) for texts in column] for column in (self.response_ids, self.queries)]
        if shapes[0] != shapes[1] or len(self.prompt_ids) != len(shapes[0]):
            raise ValueError("'prompt_ids', 'response_ids' and 'queries' differ in length")
        return self


def measure(
    models: Sequence[Any],
    policy: Scored,
    reference: Scored,
    *,
    samples: int,
    quantile_samples: int,
    temperature: float,
    kl_samples: int | None = None,
    bon_levels: Sequence[int] = (),
    forward_samples: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """All numbers of one policy, a value a prompt each, but for the diversity.

    Args:
        models: policy and reference from :func:`bond_plugin.offline.likelihood.load`; one model for the reference
            itself, which is not compared with the samples that are its own.
        policy, reference: samples of both on the same prompts.
        samples: the first so many of each prompt of the policy are used.
        quantile_samples: q of the reference for quantiles, see above.
        temperature: of the sampling; divides all logits.
        kl_samples: of how many of ``samples`` KL and entropy are computed; of all by default.
        bon_levels: the N of the KLs to Best-of-N.
        forward_samples: Best-of-N samples a prompt and level for the forward KL.
        progress: called with (responses done, responses in all) while KL and entropy are computed.

    Returns:
        ``[P]`` float64 under ``reward``, ``win_rate``, ``kl``, ``quantile``, ``log_quantile``, ``entropy`` and
        ``length`` (tokens, EOS included); N to ``[P]`` under ``backward_kl`` and ``forward_kl``, and k under
        ``pass_at`` if all rewards are 0 or 1; numbers under ``distinct_1`` and ``distinct_2``.

    Raises:
        TokenizerError: the prompts' tokens differ.
    """
    import torch

    from bond_plugin.bestofn.distribution import log_bon_ratio, quantiles
    from bond_plugin.bestofn.estimates import expected_max, win_rate
    from bond_plugin.offline import likelihood

    prompt_ids = [one.prompt_ids for one in policy.samples]
    if prompt_ids != [one.prompt_ids for one in reference.samples]:
        raise TokenizerError("the two models tokenize the prompts differently: a KL would mean nothing")
    rewards, against = policy.rewards[:, :samples], reference.rewards
    responses = [one.response_ids[:samples] for one in policy.samples]
    own = likelihood.measure(models, prompt_ids, [ids[:kl_samples] for ids in responses], temperature, progress)
    among = against[:, :quantile_samples]
    mine, others = among, against
    if len(models) == 1:  # its own samples are not to be compared with themselves
        mine, others = against[:, -quantile_samples:], against[:, rewards.shape[-1] :]
    p_lt, p_le = quantiles(rewards, mine)
    q_lt, q_le = quantiles(rewards, mine, include_self=True)
    found: dict[str, Any] = {
        "reward": rewards.mean(-1),
        "win_rate": win_rate(rewards, others),
        "kl": own.kl.mean(-1),
        "quantile": ((p_lt + p_le) / 2).mean(-1),
        "log_quantile": q_le.log().mean(-1),
        "entropy": own.entropy.mean(-1),
        "length": torch.tensor([[float(len(ids)) for ids in one] for one in responses]).mean(-1),
        "backward_kl": {},
        "forward_kl": {},
    }
    for n, places in best_of_reference(against, quantile_samples, bon_levels, forward_samples).items():
        found["backward_kl"][n] = found["kl"] - log_bon_ratio(q_lt, q_le, n).mean(-1)
        best = [
            [one.response_ids[j] for j in row] for one, row in zip(reference.samples, places.tolist(), strict=True)
        ]
        logs = likelihood.measure(models, prompt_ids, best, temperature, distributions=False).log_probs
        b_lt, b_le = quantiles(against.gather(-1, places), among, include_self=True)
        found["forward_kl"][n] = (log_bon_ratio(b_lt, b_le, n) + logs[-1] - logs[0]).mean(-1)
    if ((policy.rewards == 0) | (policy.rewards == 1)).all():
        sizes = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= policy.rewards.shape[-1]]
        found["pass_at"] = {k: expected_max(policy.rewards, k) for k in sizes}
    return found | {f"distinct_{n}": distinct(responses, n) for n in (1, 2)}


def best_of_reference(rewards: Tensor, skip: int, levels: Sequence[int], samples: int) -> dict[int, Tensor]:
    """Places of Best-of-N samples among the reference's: N to ``[P, samples]`` indices, of the best of groups of N.

    Groups do not overlap, and leave the first ``skip`` samples of a prompt out: rewards are ``[P, M]``, M at least
    skip + samples * max(levels). Samples are exchangeable, so the first of equals is as good a choice as any.
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

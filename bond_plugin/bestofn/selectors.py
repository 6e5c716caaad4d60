"""Which of N samples is selected: a selector gives each its probability, so that it can be drawn from or averaged.

    best       1 / (number of best samples) on each of these
    soft       exp(r_i / t) / sum_j exp(r_j / t): soft Best-of-N, arXiv 2505.03156; t -> 0 is best, t -> infinity one
               sample at random
    majority   the answer that most samples have: self-consistency, arXiv 2203.11171
    weighted   the answer whose samples have the largest sum of rewards: verifier voting, arXiv 2206.02336

Answers that are equally good share the probability equally, and so do the samples of an answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bond_plugin.bestofn.estimates import expected_at_max


def random_argmax(rewards: Tensor, generator: torch.Generator) -> Tensor:
    """Where the highest reward is; of equals, uniformly at random.

    Theorem 1 of BOND (arXiv 2407.14622) needs *some* strict order among equals; a random one favours no sample.
    ``[..., k]`` finite rewards to ``[..., 1]`` int64; the generator, on the CPU, orders equals.
    """
    tie_break = torch.rand(rewards.shape, generator=generator, dtype=torch.float64, device="cpu")
    shuffled = tie_break.argsort(dim=-1)
    by_reward = rewards.detach().cpu().gather(-1, shuffled).argsort(dim=-1, stable=True)
    return shuffled.gather(-1, by_reward[..., -1:]).to(rewards.device)


#: (rewards ``[..., N]``, answers ``[..., N]`` as :func:`vote` has them, temperature of ``soft``) to the probability
#: of each sample, ``[..., N]`` float64. ``best`` and ``soft`` do not look at answers, ``majority`` not at rewards.
SELECTORS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "best": lambda rewards, _, __: _among(rewards == rewards.amax(dim=-1, keepdim=True)),
    "soft": lambda rewards, _, temperature: torch.softmax(rewards.double() / temperature, dim=-1),
    "majority": lambda _, answers, __: vote(answers, torch.ones(answers.shape, dtype=torch.float64)),
    "weighted": lambda rewards, answers, _: vote(answers, rewards),
}
VOTES = ("majority", "weighted")


def vote(answers: Tensor, weights: Tensor) -> Tensor:
    """The answer with the largest sum of weights: ``[..., N]`` float64, the probability of each sample.

    Equal answers, ``[..., N]`` int64, are equal small numbers; -1 is no answer and no vote. Raises ValueError for a
    negative weight: another vote for an answer would count against it.
    """
    if (weights < 0).any():
        raise ValueError(f"votes are weighted with numbers of at least 0, got {weights.min().item():g}")
    places = answers + 1

    def of_answer(values: Tensor) -> Tensor:
        sums = torch.zeros(*answers.shape[:-1], int(places.max()) + 1, dtype=torch.float64)
        return sums.scatter_add(-1, places, values).gather(-1, places)

    votes = of_answer(weights.double() * (answers >= 0))
    return _among((votes == votes.amax(dim=-1, keepdim=True)) / of_answer(torch.ones_like(votes)))


def _among(shares: Tensor) -> Tensor:
    return shares.double() / shares.double().sum(dim=-1, keepdim=True)


def pick(probabilities: Tensor, generator: torch.Generator | None) -> int:
    """Draw one of N samples, ``[N]``; without a generator the first that may be drawn."""
    if generator is None:
        return int((probabilities > 0).int().argmax())
    return int(torch.multinomial(probabilities, 1, generator=generator))


def expected(
    name: str,
    rewards: Tensor,
    answers: Tensor,
    values: Tensor,
    n: int,
    temperature: float = 1.0,
    seed: int = 0,
    subsets: int = 200,
) -> float:
    """The mean of ``values`` at the sample that a selector selects of n, estimated without bias from k >= n samples.

    The mean over all subsets of n of the k samples of a prompt, ``[k]`` each; of other selectors than ``best`` over
    ``subsets`` of them at random, with the selector's own probabilities in each.
    """
    k = len(values)
    if name == "best":
        return expected_at_max(rewards, values, n).item()
    if n == 1:
        return values.double().mean().item()
    places = torch.arange(k).unsqueeze(0)
    if n < k:
        places = torch.rand(subsets, k, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)[:, :n]
    probabilities = SELECTORS[name](rewards[places], answers[places], temperature)
    return (probabilities * values.double()[places]).sum(dim=-1).mean().item()

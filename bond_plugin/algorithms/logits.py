"""Losses on logits: policy and teacher at the same tokens, a piece of tokens or of the vocabulary at a time.

K tokens times V words in fp32, twice, and again for the gradient, are what usually does not fit; :class:`Logits`
holds the hidden states before the output layers instead, and makes logits in pieces, and once more for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Head:
    """A model at K tokens: ``[K, H]`` before the output layer, of each's place; weight ``[V, H]``, bias ``[V]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, tokens: slice, words: slice) -> Tensor:
        """``[k, v]``, fp32 at the least."""
        bias = None if self.bias is None else self.bias[words]
        found = linear(self.hidden[tokens], self.weight[words], bias)
        return found if found.dtype == torch.float64 else found.float()


@dataclass(frozen=True)
class Logits:
    """The distributions of the policy and of a teacher at K response tokens; the policy's has a gradient.

    Attributes:
        policy, teacher: of one vocabulary. Where a model has its layer padded, the words that both have count.
        temperature: by which logits are divided.
        limit: bytes of logits to hold at a time.
    """

    policy: Head
    teacher: Head
    temperature: float = 1.0
    limit: float = 2**28

    @property
    def tokens(self) -> int:
        """K."""
        return len(self.policy.hidden)

    @property
    def words(self) -> int:
        """V."""
        return min(len(self.policy.weight), len(self.teacher.weight))

    def split(self, size: int) -> list[Logits]:
        """Of ``size`` tokens each; the last may have fewer."""
        hidden = (head.hidden.split(size) for head in (self.policy, self.teacher))
        return [
            replace(self, policy=replace(self.policy, hidden=own), teacher=replace(self.teacher, hidden=other))
            for own, other in zip(*hidden, strict=True)
        ]

    def over_tokens(self, compare: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``[K]``: ``compare`` takes log-probabilities of policy and teacher, ``[k, V]`` each, and gives ``[k]``."""
        return self._over_tokens(lambda *both: compare(*(logits.log_softmax(dim=-1) for logits in both)))

    def over_words(self, compare: Callable[[Tensor, Tensor], Tensor], held: int = 2) -> Tensor:
        """The sum over pieces of the vocabulary of ``compare``, which takes log-probabilities ``[K, v]`` of both.

        Args:
            compare: gives the same shape for all pieces.
            held: how many numbers it holds of each token and word at a time.
        """
        size = max(1, int(self.limit / (4 * max(held, 2) * self.tokens)))
        totals = self._over_tokens(lambda *both: torch.stack([logits.logsumexp(dim=-1) for logits in both], dim=-1))

        def piece(start: int) -> Tensor:
            both = self._both(slice(0, self.tokens), slice(start, min(start + size, self.words)))
            return compare(*(logits - total for logits, total in zip(both, totals.split(1, dim=-1), strict=True)))

        found = _again(piece, 0)
        for start in range(size, self.words, size):
            found = found + _again(piece, start)
        return found

    def distances(self) -> Tensor:
        """``[K, K]``: the L1 distance of each token of the policy to each of the teacher, in [0, 2]."""
        return self.over_words(lambda own, other: torch.cdist(own.exp(), other.exp(), p=1), held=self.tokens)

    def _over_tokens(self, compare: Callable[..., Tensor]) -> Tensor:
        """What ``compare`` gives of logits ``[k, V]`` of policy and teacher, one piece of tokens after the other."""
        size = max(1, int(self.limit / (8 * self.words)))

        def piece(start: int) -> Tensor:
            return compare(*self._both(slice(start, start + size), slice(0, self.words)))

        return torch.cat([_again(piece, start) for start in range(0, self.tokens, size)])

    def _both(self, tokens: slice, words: slice) -> list[Tensor]:
        return [head.logits(tokens, words) / self.temperature for head in (self.policy, self.teacher)]


def _again(piece: Callable[[int], Tensor], start: int) -> Tensor:
    """A piece, whose logits are made again for the gradient instead of being kept."""
    return checkpoint(piece, start, use_reentrant=False, preserve_rng_state=False)

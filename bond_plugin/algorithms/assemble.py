"""One step from samples to a loss, as the host, the laboratory and the recipes all take it.

    samples -> selection -> advantages -> rows -> mean over prompts

Each of P prompts has n samples of the policy and m source samples, f of which are selected. Its *rows* are what
enters the loss: the n of the policy, and then the f selected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bond_plugin.algorithms.base import Algorithm
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs, LossInputs, LossOutputs

PolicyLoss = Callable[[LossInputs], LossOutputs]


class ContractError(ValueError):
    """A method returns something else than its interface says. The message says what."""


@dataclass(frozen=True)
class Rows:
    """How many rows a prompt has: ``policy``, n, which come first, and ``selected``, f source samples."""

    policy: int
    selected: int = 0

    @property
    def all(self) -> int:
        return self.policy + self.selected

    def from_source(self, prompts: int) -> Tensor:
        """``[P, n + f]`` bool: which rows are source samples."""
        return (torch.arange(self.all) >= self.policy).expand(prompts, self.all)

    def weights(self, from_source: Tensor) -> Tensor:
        """What each row counts for in the loss of its prompt: 1 / n or 1 / f, in the shape of ``from_source``."""
        return torch.where(from_source, 1.0 / max(self.selected, 1), 1.0 / self.policy)


def select(algorithm: Algorithm, n: int, source_rewards: Tensor, generator: torch.Generator) -> Tensor:
    """The places of a prompt's rows among its n + m samples, the policy's first: ``[P, n + f]``.

    Raises ContractError if the algorithm selects another number of samples, or samples that are not there.
    """
    needs, (prompts, m) = algorithm.needs(), source_rewards.shape
    places = torch.arange(n).expand(prompts, n)
    if not needs.selected_samples:
        return places
    chosen = algorithm.select(source_rewards, generator)
    chosen = checked("select's indices", chosen, (prompts, needs.selected_samples))
    if not ((chosen >= 0) & (chosen < m)).all():
        raise ContractError(f"select's indices must lie in 0 ... {m - 1}: there are {m} source samples a prompt")
    return torch.cat([places, n + chosen], dim=-1)


def advantages(algorithm: Algorithm, inputs: AdvantageInputs) -> AdvantageOutputs:
    """What the algorithm gives, with the ``advantages`` of all rows, ``[P, n + f, A]``.

    They are the same in all tokens of a response, also beyond its end, where the algorithm has one number a response.
    Raises ContractError for another shape than the interface says, or a number that is not finite.
    """
    needs, found = algorithm.needs(), algorithm.advantages(inputs)
    shape, tokens = inputs.rewards.shape, inputs.under["policy"].shape[-1]
    made = per_token("advantages", found.advantages, shape, tokens)
    targets = checked("classifier_targets", found.classifier_targets, shape) if needs.classifier else None
    if needs.selected_samples:
        shape = (len(made), needs.selected_samples)
        made = torch.cat([made, per_token("selected_advantages", found.selected_advantages, shape, tokens)], dim=1)
    return AdvantageOutputs(made, metrics=found.metrics, classifier_targets=targets)


def weighed_loss(policy_loss: PolicyLoss, inputs: LossInputs, rows: Rows) -> LossOutputs:
    """The loss of each row times what the row counts for: a step's rows sum up to P times the mean over prompts.

    Raises ContractError if the policy loss returns another shape than its interface says.
    """
    found = policy_loss(inputs)
    row_loss = checked("row_loss", found.row_loss, inputs.from_source.shape, finite=False)
    return replace(found, row_loss=row_loss * rows.weights(inputs.from_source).to(row_loss))


def per_token(name: str, values: Tensor | None, shape: tuple[int, ...], tokens: int) -> Tensor:
    """``[P, n, A]`` of what has one number a token, or one a response, which then all of its tokens have."""
    if isinstance(values, Tensor) and values.dim() == 3:
        return checked(name, values, (*shape, tokens))
    return checked(name, values, shape).unsqueeze(-1).expand(*shape, tokens)


def checked(name: str, values: Tensor | None, shape: tuple[int, ...], finite: bool = True) -> Tensor:
    """``values``, if they have the shape and, unless that does not matter, are finite; else a ContractError."""
    if not isinstance(values, Tensor) or tuple(values.shape) != tuple(shape):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ContractError(f"{name} must be a tensor of shape {tuple(shape)}, got {found}")
    if finite and not torch.isfinite(values).all():
        raise ContractError(
            f"{name} must be finite: a log-probability is not, or the logarithm of 0 or a division by it is taken"
        )
    return values

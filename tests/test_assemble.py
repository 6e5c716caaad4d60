"""The one way from samples to a loss, by its definition: rows, their weights, and what an algorithm is given."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bond_plugin.algorithms import AdvantageInputs, AdvantageOutputs, Algorithm, LossInputs, Needs, assemble
from bond_plugin.algorithms.assemble import ContractError, Rows
from bond_plugin.algorithms.base import Config, flag
from bond_plugin.algorithms.jbond import policy_loss

PROMPTS, N, DRAWN, SELECTED, TOKENS = 3, 4, 5, 2, 6
RANDOM = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RANDOM, dtype=torch.float64)


REWARDS, SOURCE_REWARDS = draw(PROMPTS, N), draw(PROMPTS, DRAWN)
UNDER = {name: -draw(PROMPTS, N + SELECTED, TOKENS).abs() for name in ("policy", "anchor", "reference", "behaviour")}


class Recording(Algorithm):
    """Takes the two best of five samples of the anchor, and notes what it is given."""

    found: AdvantageOutputs | None = None

    def needs(self) -> Needs:
        return Needs(
            source_samples=DRAWN,
            selected_samples=SELECTED,
            log_probs={"anchor", "reference"},
            anchor_eta=0.1,
        )

    def select(self, source_rewards: Tensor, generator: torch.Generator) -> Tensor:
        return source_rewards.topk(SELECTED).indices

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        self.given = batch
        return self.found or AdvantageOutputs(draw(PROMPTS, N), draw(PROMPTS, SELECTED))


def assembled(algorithm: Algorithm) -> AdvantageOutputs:
    return assemble.advantages(algorithm, AdvantageInputs(REWARDS, SOURCE_REWARDS, UNDER, torch.Generator()))


def test_rows_are_the_policys_samples_and_then_the_selected() -> None:
    places = assemble.select(Recording(Recording.Config()), N, SOURCE_REWARDS, torch.Generator())
    assert places[:, :N].tolist() == [[0, 1, 2, 3]] * PROMPTS
    both = torch.cat([REWARDS, SOURCE_REWARDS], dim=-1).gather(-1, places)
    assert torch.equal(both[:, N:], SOURCE_REWARDS.sort(descending=True).values[:, :SELECTED])
    nothing = assemble.select(Algorithm(Algorithm.Config()), N, SOURCE_REWARDS[:, :0], torch.Generator())
    assert nothing.tolist() == [[0, 1, 2, 3]] * PROMPTS


def test_an_algorithm_is_given_sums_and_ratios_of_its_rows() -> None:
    algorithm = Recording(Recording.Config())
    assembled(algorithm)
    given = algorithm.given
    totals = {name: values.sum(-1) for name, values in UNDER.items()}
    torch.testing.assert_close(given.log_probs, totals["policy"])
    for name in ("anchor", "reference", "behaviour"):
        torch.testing.assert_close(given.log_ratios(name), UNDER["policy"] - UNDER[name])
        torch.testing.assert_close(given.log_ratio(name), (totals["policy"] - totals[name])[:, :N])


@pytest.mark.parametrize("of_tokens", [False, True])
def test_one_number_a_response_is_that_of_all_its_tokens(of_tokens: bool) -> None:
    algorithm = Recording(Recording.Config())
    own, selected = draw(PROMPTS, N, *[TOKENS] * of_tokens), draw(PROMPTS, SELECTED)
    algorithm.found = AdvantageOutputs(own, selected)
    found = assembled(algorithm).advantages
    assert found.shape == (PROMPTS, N + SELECTED, TOKENS)
    for token in range(TOKENS):
        assert torch.equal(found[:, :N, token], own[..., token] if of_tokens else own)
        assert torch.equal(found[:, N:, token], selected)


@pytest.mark.parametrize(("n", "selected"), [(1, 1), (4, 0), (4, 2), (2, 5)])
def test_the_loss_is_the_mean_over_prompts_of_both_means(n: int, selected: int) -> None:
    """Each kind of row by its own number, with rows in any order and in any micro-batches."""
    rows = Rows(n, selected)
    from_source = rows.from_source(PROMPTS)
    log_probs, advantages = -draw(*from_source.shape, TOKENS).abs(), draw(*from_source.shape, TOKENS)
    per_row = -(log_probs * advantages).sum(-1)
    wanted = per_row[:, :n].mean()
    if selected:
        wanted = wanted + per_row[:, n:].mean()
    flat = LossInputs(
        log_probs=log_probs.flatten(0, 1),
        old_log_probs=log_probs.flatten(0, 1),
        advantages=advantages.flatten(0, 1),
        mask=torch.ones(from_source.numel(), TOKENS, dtype=torch.float64),
        from_source=from_source.flatten(),
        on_policy=True,
        clip_low=0.2,
        clip_high=0.2,
    )
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.randperm(from_source.numel(), generator=RANDOM).split(4):
        tensors = {name: value[part] for name, value in vars(flat).items() if isinstance(value, Tensor)}
        total += assemble.weighed_loss(policy_loss, replace(flat, **tensors), rows).row_loss.sum()
    torch.testing.assert_close(total / PROMPTS, wanted)


@pytest.mark.parametrize(("found", "says"), [
    (AdvantageOutputs(draw(PROMPTS), draw(PROMPTS, SELECTED)), r"advantages must be a tensor of shape \(3, 4\)"),
    (AdvantageOutputs(draw(PROMPTS, N)), "selected_advantages must be a tensor .* got NoneType"),
    (AdvantageOutputs(draw(PROMPTS, N, TOKENS + 1), draw(PROMPTS, SELECTED)), r"shape \(3, 4, 6\), got \(3, 4, 7\)"),
    (AdvantageOutputs(draw(PROMPTS, N) / 0, draw(PROMPTS, SELECTED)), "advantages must be finite"),
])  # fmt: skip
def test_a_broken_contract_is_named(found: AdvantageOutputs, says: str) -> None:
    algorithm = Recording(Recording.Config())
    algorithm.found = found
    with pytest.raises(ContractError, match=says):
        assembled(algorithm)


def test_samples_that_are_not_there_cannot_be_selected() -> None:
    algorithm = Recording(Recording.Config())
    algorithm.select = lambda rewards, generator: rewards.topk(SELECTED).indices + DRAWN
    with pytest.raises(ContractError, match=r"must lie in 0 ... 4: there are 5"):
        assemble.select(algorithm, N, SOURCE_REWARDS, torch.Generator())
    algorithm.select = lambda rewards, generator: rewards.argmax(-1)
    with pytest.raises(ContractError, match=r"select's indices must be a tensor of shape \(3, 2\), got \(3,\)"):
        assemble.select(algorithm, N, SOURCE_REWARDS, torch.Generator())


@dataclass(frozen=True)
class Bounded(Config):
    above: float = flag(1.0, "a number", gt=0)
    least: int = flag(1, "a number", ge=0)
    share: float = flag(0.5, "a number", gt=0, le=1)
    closed: float = flag(0.5, "a number", ge=0, le=1)


@pytest.mark.parametrize(("name", "right", "wrong", "says"), [
    ("above", [1e-9, 1e300], [0, -1, math.inf, math.nan], "be above 0"),
    ("least", [0, 7], [-1, math.inf], "be at least 0"),
    ("share", [1e-9, 1], [0, 1.001, math.nan], "lie in (0, 1]"),
    ("closed", [0, 1], [-0.001, 1.001], "lie in [0, 1]"),
])  # fmt: skip
def test_a_flags_bounds_are_in_its_help_and_in_its_error(
    name: str, right: list[float], wrong: list[float], says: str
) -> None:
    bounds = says.partition(" ")[2]
    assert Bounded.options("bond")[f"bond.{name}"].metadata["help"] == f"a number; {bounds}"
    for value in right:
        assert getattr(Bounded.from_flags({f"bond.{name}": value}, "bond"), name) == value
    for value in wrong:
        with pytest.raises(ValueError, match=re.escape(f"--bond.{name} must {says}, got {value}")):
            Bounded(**{name: value})

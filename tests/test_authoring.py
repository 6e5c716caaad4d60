"""The algorithm of docs/authoring.md: what it says it aims at, and that the laboratory takes it by its import path.

That the host takes it, test_command_line.py tests with the shipped matrices and test_end_to_end.py with a whole run.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY

from bond_plugin.cli.main import main
from bond_plugin.lab import programme
from bond_plugin.lab.learner import train
from bond_plugin.lab.methods import build
from bond_plugin.lab.problem import Problem

FILE = REPOSITORY / "recipes" / "authoring" / "best_of_two.py"
PAGE = REPOSITORY / "docs" / "authoring.md"
PATH = "recipes.authoring.best_of_two:BestOfTwo"


def test_the_whole_algorithm_is_under_sixty_lines_and_the_page_shows_them() -> None:
    lines = FILE.read_text().splitlines()
    assert len(lines) < 60
    (shown,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert "def advantages" in shown
    assert set(shown.splitlines()) <= set(lines)


@pytest.mark.parametrize("rewards", ["strict", "tied"])
def test_it_ends_where_its_gradient_is_zero(rewards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There 2 share - pull (log pi - log pi_initial) is the same for all responses, shares being the policy's own."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    pull = 0.5
    method = build(PATH, pull=pull)
    problem = Problem.make(rewards)
    training = replace(programme.training_of(method, seed=7), steps=320)
    policy = problem.policy("full")
    train(problem, method, policy, 4, training)
    found = policy.log_probs().detach()
    mass = found.exp()
    difference = problem.rewards.unsqueeze(-1) - problem.rewards.unsqueeze(-2)
    share = ((difference.sign() + 1) / 2) @ mass
    left = 2 * share - pull * (found - problem.log_ref)
    spread = (mass * (left - (mass * left).sum()) ** 2).sum().sqrt().item()
    assert (mass * (found - problem.log_ref)).sum() > 0.3  # it has gone some way
    assert spread < 0.02


def test_the_laboratory_takes_an_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    few = ["--steps", "2", "--prompts", "16", "--samples", "4"]
    assert main(["lab", "--algorithm", PATH, "--bond.pull", "1", "--output-dir", str(tmp_path), *few]) == 0
    assert json.loads((tmp_path / "lab.json").read_text())["tables"]["one"]["rows"][2]["name"] == "BestOfTwo"

"""The matrix file of `bond bench`: what it means, and what is wrong with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from bond_plugin.bench.matrix import MatrixError, parse, read

GOOD: dict[str, Any] = {
    "title": "two",
    "common": {"actor": {"model_name_or_path": "model"}, "rollout": {"max_new_tokens": 8}},
    "evaluation": {"prompts": "held.jsonl", "bon_levels": [4], "reference_samples": 64},
    "seeds": [1, 2],
    "methods": {
        "jbond": {
            "label": "J-BOND",
            "flags": {"algo": {"advantage": {"estimator": "jbond"}}},
            "strength": {"bond.gamma": [0, 0.5], "bond": {"eta": [0.1]}},
        },
        "rloo": {
            "flags": {"algo.advantage.estimator": "rloo"},
            "strength": [{"algo.kl.init_coef": 0.1, "actor.adam.lr": 1.0e-4}, {"algo": {"kl": {"init_coef": 1.0}}}],
            "seeds": [7],
        },
    },
}


def test_cells_are_every_combination_each_with_its_first_seed_first() -> None:
    found = parse(GOOD)
    assert [cell.name for cell in found.cells] == [
        "jbond gamma=0 eta=0.1 seed=1",
        "jbond gamma=0.5 eta=0.1 seed=1",
        "rloo kl_coef=0.1 lr=0.0001 seed=7",
        "rloo kl_coef=1 seed=7",
        "jbond gamma=0 eta=0.1 seed=2",
        "jbond gamma=0.5 eta=0.1 seed=2",
    ]
    assert [cell.label for cell in found.cells[1:3]] == ["J-BOND", "rloo"]
    assert found.cells[1].flags == {
        "actor.model_name_or_path": "model",
        "rollout.max_new_tokens": 8,
        "algo.advantage.estimator": "jbond",
        "bond.gamma": 0.5,
        "bond.eta": 0.1,
    }
    assert found.cells[2].own == {
        "algo.advantage.estimator": "rloo", "algo.kl.init_coef": 0.1, "actor.adam.lr": 1e-4
    }  # fmt: skip
    assert len({cell.folder for cell in found.cells}) == 6
    assert all("/" not in cell.folder and " " not in cell.folder for cell in found.cells)


def test_a_strength_wins_over_the_method_and_the_method_over_all() -> None:
    given = copy.deepcopy(GOOD)
    given["common"]["bond"] = {"gamma": 3, "beta": 0.1}
    given["methods"] = {"jbond": {"flags": {"bond": {"beta": 0.2, "eta": 9}}, "strength": {"bond.eta": [1]}}}
    (cell, _) = parse(given).cells
    assert (cell.flags["bond.gamma"], cell.flags["bond.beta"], cell.flags["bond.eta"]) == (3, 0.2, 1)


def change(path: str, value: Any) -> dict[str, Any]:
    given = copy.deepcopy(GOOD)
    *parts, last = path.split("/")
    node = given
    for part in parts:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return given


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("methods", None, "'methods' is missing"),
        ("method", {}, "unknown key 'method'; did you mean 'methods'?"),
        ("methods/jbond/strenght", {}, "methods.jbond: unknown key 'strenght'; did you mean 'strength'?"),
        ("methods", {}, "methods: "),
        ("methods/j bond", {}, "methods.j bond"),
        ("methods/jbond/strength", {"bond.gamma": 1}, "methods.jbond.strength: 'bond.gamma' must be a list"),
        ("methods/jbond/strength", [], "methods.jbond.strength: the list is empty"),
        ("methods/jbond/seeds", [1, 1], "methods.jbond.seeds: [1, 1] has a number twice"),
        ("methods/jbond/strength", {"bond.gamma": [1, 1.0]}, "is there twice"),
        ("seeds", 3, "seeds: must be a valid list, got 3"),
        ("common/train", {"seed": 3}, "common: 'train.seed' is set for each cell; drop it"),
        ("methods/jbond/flags", {"ckpt": {"path": "x"}}, "'ckpt.path' is set for each cell"),
        ("common/actor.model_name_or_path", "other", "common: 'actor.model_name_or_path' is given twice"),
        ("evaluation/prompts", None, "evaluation: 'prompts' is missing"),
        ("evaluation/sample", 3, "evaluation: unknown key 'sample'; did you mean 'samples'?"),
        ("evaluation/samples", 0, "evaluation.samples: "),
        ("evaluation/bon_levels", [1], "evaluation.bon_levels.0: "),
        ("evaluation/bon_levels", [16], "evaluation: reference_samples must be at least 96"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, said: str) -> None:
    with pytest.raises(MatrixError) as caught:
        parse(change(path, value))
    assert said in str(caught.value)


def test_only_some_methods_are_run_and_the_others_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text("common: {}\nevaluation: {prompts: p}\nseeds: [1, 2]\nmethods: {a: {}, b: {}, c: {}}")
    whole = read(path)
    assert whole.only([]) == whole and whole.others == ()
    some = whole.only(["c", "a"])
    assert [cell.name for cell in some.cells] == ["a seed=1", "c seed=1", "a seed=2", "c seed=2"]
    assert [cell.name for cell in some.others] == ["b seed=1", "b seed=2"]
    with pytest.raises(MatrixError, match="--only d: the file has a, b, c"):
        whole.only(["d"])


def test_errors_of_a_file_name_it(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match=r"gone\.yaml: no such file"):
        read(tmp_path / "gone.yaml")
    path = tmp_path / "twice.yaml"
    path.write_text("title: a\ntitle: b\n")
    with pytest.raises(MatrixError, match=r"twice\.yaml: not valid YAML.*'title' is given twice"):
        read(path)
    path.write_text("[]")
    with pytest.raises(MatrixError, match="must be a valid dictionary"):
        read(path)

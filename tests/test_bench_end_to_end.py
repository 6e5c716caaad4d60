"""`bond bench` on the tiny model: real training runs of one of our algorithms and one of the host's, and resuming."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from conftest import Run, Tiny, execute, nested, recipe_for

pytestmark = pytest.mark.e2e
PROMPTS = 6


@pytest.fixture(scope="module")
def matrix(tiny: Tiny) -> dict[str, Any]:
    common = {**recipe_for(tiny), "data.max_samples": 32}
    for name in ("algo.advantage.estimator", "bond.n_anchor_samples", "train.batch_size"):
        common.pop(name)
    printed = {"algo.advantage.estimator": "jbond", "bond.n_anchor_samples": 2, "train.batch_size": 16}
    return {
        "title": "two algorithms and a mistake",
        "common": nested(common),
        "evaluation": {"prompts": "held.jsonl", "samples": 8, "reference_samples": 64, "bon_levels": [2, 4]},
        "seeds": [1],
        "methods": {
            "jbond": {
                "label": "J-BOND",
                "flags": nested(printed),
            },
            "broken": {
                "flags": nested({**printed, "bond.max_engine_gap": 1e-12})
            },
            "rloo": {
                "flags": nested({
                    "algo.advantage.estimator": "rloo", "rollout.n_samples_per_prompt": 3, "train.batch_size": 48,
                }),
                "strength": {"algo.kl.init_coef": [0.05]},
            },
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def bench(tiny: Tiny, forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    folder = tmp_path_factory.mktemp("bench")
    lines = tiny.prompts.read_text().splitlines(keepends=True)
    (folder / "held.jsonl").write_text("".join(lines[:PROMPTS]))

    def run(wanted: dict[str, Any], *flags: str) -> Run:
        (folder / "matrix.yaml").write_text(yaml.safe_dump(wanted, sort_keys=False))
        command = [sys.executable, "-m", "bond_plugin", "bench", "matrix.yaml", "--output-dir", "out", *flags]
        return execute(command, folder, OMP_NUM_THREADS="1", **forks)

    return run


@pytest.fixture(scope="module")
def first(bench: Callable[..., Run], matrix: dict[str, Any]) -> Run:
    return bench(matrix)


def results(run: Run) -> dict[str, dict[str, Any]]:
    lines = (run.folder / "out" / "results.jsonl").read_text().splitlines()
    return {found["method"]: found for found in map(json.loads, lines)}


def test_cells_are_trained_and_measured_and_a_failed_one_stops_no_other(first: Run) -> None:
    assert first.status == 1, first.said
    found = results(first)
    assert [cell["status"] for cell in found.values()] == ["done", "failed", "done"]
    assert "status 1: bond_plugin.host.advantages.EngineGapError: " in found["broken"]["error"]
    assert "2/3 broken seed=1: FAILED" in first.output
    for method in ("jbond", "rloo"):
        values = found[method]["evaluation"]
        assert all(len(values[key]) == PROMPTS for key in ("reward", "kl", "win_rate", "entropy"))
        assert min(values["kl"]) > 0
        assert set(values["backward_kl"]) == set(values["forward_kl"]) == {"2", "4"}
        training = found[method]["training"]
        assert training["steps"] == 2
        assert 2 * 48 * 2 < training["generated_tokens"] <= 2 * 48 * 10  # 48 samples a step, companions too
        assert training["peak_memory_gib"] > 0.2
        assert not (first.folder / "out" / "cells" / f"{method}-seed1" / "policy").exists()


def test_the_report_is_written(first: Run) -> None:
    for name in ("report.md", "report.html"):
        text = (first.folder / "out" / name).read_text()
        assert "J-BOND" in text
        assert "EngineGapError" in text


def test_the_same_command_runs_only_what_failed(
    first: Run, bench: Callable[..., Run], matrix: dict[str, Any]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (first.folder / "out" / "cells").glob("*/result.json")}
    methods = matrix["methods"] | {"rloo": matrix["methods"]["rloo"] | {"label": "another label"}}
    again = bench({**matrix, "title": "another title", "methods": methods})
    assert "2 of 3 cells are finished already" in again.output
    report = (first.folder / "out" / "report.md").read_text()
    assert report.startswith("# another title\n")
    assert "another label" in report
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.parent.name for path in before if before[path] != after[path]] == ["broken-seed1"]


def test_what_is_finished_stays_in_the_report_when_other_methods_are_run(
    first: Run, bench: Callable[..., Run], matrix: dict[str, Any]
) -> None:
    """And a method that could not run does not stop those that are asked for."""
    methods = {**matrix["methods"], "wrong": {"flags": nested({"bond.gama": 1, "algo.advantage.estimator": "jbond"})}}
    one = bench({**matrix, "methods": methods}, "--only", "rloo")
    assert one.status == 0 and "1 of 1 cells are finished already" in one.output
    assert set(results(first)) == {"jbond", "rloo"}
    assert "J-BOND" in (first.folder / "out" / "report.md").read_text()


def test_flags_that_cannot_run_are_found_before_anything_starts(
    first: Run, bench: Callable[..., Run], matrix: dict[str, Any]
) -> None:
    methods = {**matrix["methods"], "wrong": {"flags": nested({"bond.gama": 1, "algo.advantage.estimator": "jbond"})}}
    refused = bench({**matrix, "methods": methods})
    assert refused.status == 2
    assert "wrong seed=1" in refused.output
    assert "did you mean 'bond.gamma'?" in refused.output
    flags = nested({"algo.advantage.estimator": "jbond", "train.batch_size": 16, "bond.eta": 2.0})
    changed = bench({**matrix, "methods": {**matrix["methods"], "jbond": {"flags": flags}}}, "--check")
    assert changed.status == 2 and "--bond.eta must lie in [0, 1], got 2.0" in changed.output
    other = {"flags": nested({"rollout.max_new_tokens": 5, "algo.advantage.estimator": "reinforce"})}
    unlike = bench({**matrix, "methods": {**matrix["methods"], "short": other}}, "--check")
    assert unlike.status == 2
    assert "must have the same --rollout.max_new_tokens: 5 in 'short seed=1', 10 in 'jbond seed=1'" in unlike.output

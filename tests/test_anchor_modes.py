"""The anchor beside what the host trains: Adam, Muon, LoRA, ZeRO-1 to 3, tensor parallelism, states put to sleep."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import Tiny, recipe_for, to_argv
from test_distributed import launch
from transformers import LlamaConfig, LlamaForCausalLM

#: Ranks: optimiser (or lora, or sleep) and ZeRO stage.
RUNS = {1: ["adam:1", "muon:2", "lora:2", "lora:3"], 2: ["muon:1", "lora:2", "sleep:1", "sleep:2", "tp:2"]}


@pytest.fixture(scope="module")
def kept(tiny: Tiny, forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(tiny.model, folder / "model")
    config = LlamaConfig.from_pretrained(tiny.model, num_key_value_heads=2, tie_word_embeddings=False)  # two halves
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    argv = folder / "flags.json"
    flags = {**recipe_for(tiny), "actor.model_name_or_path": folder / "model", "bond.eta": 0.1}
    argv.write_text(json.dumps(to_argv(flags)))
    found = {}
    for ranks, runs in RUNS.items():
        out = folder / f"{ranks}.json"
        launch("kept.py", ranks, argv, out, *runs, forks=forks)
        found[ranks] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(("ranks", "run"), [(r, run) for r, runs in RUNS.items() for run in runs], ids=str)
def test_the_anchor_follows_the_masters_and_takes_their_place(kept: dict[int, dict], ranks: int, run: str) -> None:
    found = kept[ranks][run]
    print(found)
    assert (found["frozen"] > 0) == run.startswith("lora")
    assert (found["split"] > 0) == run.startswith("tp")
    assert len(found["swaps"]) == (4 if run.startswith("sleep") else 1)  # awake, asleep, awake again, trained again
    for swap in found["swaps"]:
        assert swap["anchor"] < 1e-3
        assert swap["moved"]
        assert swap["reference"]
        assert swap["restored"]
        assert swap["base"]  # what LoRA does not train is not touched
    if run.startswith("sleep"):
        assert found["asleep"] > 0
        assert found["awake"] == 0
    assert found["distance"] == pytest.approx(found["distance_exact"], rel=1e-3)
    assert found["files"]
    assert found["loaded"]
    assert found["masters_loaded"]


def test_the_distance_takes_memory_for_a_piece_at_a_time(kept: dict[int, dict]) -> None:
    found = kept[1]["adam:1"]
    assert found["piece"] <= 1000 < found["largest"]
    assert found["distance_in_pieces"] == pytest.approx(found["distance"], rel=1e-9)

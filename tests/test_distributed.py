"""Real DeepSpeed, one and two ranks, ZeRO-1 to 3: the anchor, and the loss's independence of the split.

The anchor also beside what else the host trains: Muon, LoRA, tensor parallelism, states put to sleep.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, clean_environment, python_of, recipe_for, to_argv
from transformers import LlamaConfig, LlamaForCausalLM

from bond_plugin.host import checkpoints

WORKERS = Path(__file__).parent / "workers"


def launch(script: str, ranks: int, *arguments: object, **options: Any) -> None:
    """Run a worker as :func:`start` does, and wait for all its processes."""
    children = start(script, ranks, *arguments, **options)
    outputs = [child.communicate(timeout=300)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output[-4000:]


def start(
    script: str,
    ranks: int,
    *arguments: object,
    device: str = "cpu",
    forks: dict[str, str] | None = None,
    **environment: str,
) -> list[subprocess.Popen]:
    """Start a worker in ``ranks`` processes; with ``cuda`` each has a GPU of its own.

    ``forks`` is the fixture of that name: the processes are copies of one that has the host's imports.
    """
    forks = forks or {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [python_of(forks), str(WORKERS / script), *map(str, arguments)],
            env=clean_environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank) if device == "cuda" else "0",
                BOND_DEVICE=device,
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                OMP_NUM_THREADS="1",
                **forks,
                **environment,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


ANCHORS = {1: ["2:500", "3:40"], 2: ["2:40", "3:40"]}
SPLITS = {1: ["2:16", "2:4", "2:1"], 2: ["2:2", "3:4"]}


@pytest.fixture(scope="module")
def anchors(forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    found = {}
    for ranks, runs in ANCHORS.items():
        path = tmp_path_factory.mktemp("anchor") / "out.json"
        launch("anchor.py", ranks, path, *runs, forks=forks)
        found[ranks] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def gradients(forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    found = {}
    for ranks, splits in SPLITS.items():
        path = tmp_path_factory.mktemp("sharding") / "out.pt"
        launch("sharding.py", ranks, path, *splits, forks=forks)
        found[ranks] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize(("ranks", "run"), [(r, run) for r, runs in ANCHORS.items() for run in runs], ids=str)
def test_anchor_is_an_fp32_average_of_the_masters(anchors: dict[int, dict], ranks: int, run: str) -> None:
    """``run`` is ZeRO stage:optimiser steps."""
    found = anchors[ranks][run]
    long = run.endswith(":500")
    print(found)
    assert found["ranks"] == ranks
    if long:
        # bf16 training, learning rate 3e-6, eta 0.02: against the float64 recursion.
        assert found["error"] < 1e-4
        assert found["naive_error"] > 0.3  # an average kept in bf16 does not follow
    assert found["error"] < 1e-2  # a few steps move so little that fp32's resolution shows
    assert found["anchor_is_rounded_average"]
    assert found["anchor_differs_from_policy"] or not long
    assert found["reference_is_initial"]
    assert found["restored_exactly"]
    assert found["nested"] == "refused"
    assert found["trains_on"]
    assert found["distance"] == pytest.approx(found["distance_exact"], rel=1e-3)
    # Once in a data-parallel group: 4 bytes a parameter, divided among the ranks (and padding).
    assert found["bytes_per_rank"] <= 4 * found["parameters"] / ranks + 4096
    assert found["loaded"]  # from a checkpoint
    assert "holds no anchor" in found["without_anchor"]
    assert found["copies"] == [False, False, True, False]  # --bond.anchor periodic, every three steps


@pytest.mark.parametrize(
    ("ranks", "split"), [(r, split) for r, splits in SPLITS.items() for split in splits], ids=str
)
def test_gradient_does_not_depend_on_how_the_batch_is_split(
    gradients: dict[int, dict], ranks: int, split: str
) -> None:
    """``split`` is ZeRO stage:micro-batch size."""
    saved = gradients[ranks]
    for name, wanted in saved["wanted"].items():
        torch.testing.assert_close(saved["found"][split][name].float(), wanted, rtol=1e-4, atol=1e-6, msg=name)


#: Ranks: optimiser (or lora, or sleep) and ZeRO stage.
MODES = {1: ["adam:1", "muon:2", "lora:2", "lora:3"], 2: ["muon:1", "lora:2", "sleep:1", "sleep:2", "tp:2"]}


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
    for ranks, runs in MODES.items():
        out = folder / f"{ranks}.json"
        launch("kept.py", ranks, argv, out, *runs, forks=forks)
        found[ranks] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(("ranks", "run"), [(r, run) for r, runs in MODES.items() for run in runs], ids=str)
def test_the_anchor_follows_the_masters_and_takes_their_place(kept: dict[int, dict], ranks: int, run: str) -> None:
    found = kept[ranks][run]
    print(found)
    assert (found["frozen"] > 0) == run.startswith("lora")
    assert (found["split"] > 0) == run.startswith("tp")
    assert found["adam"] == "torch.optim.adamw.AdamW"  # DeepSpeed's own would be compiled first
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
    assert found["distance_in_pieces"] == pytest.approx(found["distance"], rel=1e-5)


#: Ranks: what is saved, as KIND:STAGE.
SAVED = {1: ["adam:3"], 2: ["adam:1", "adam:2", "adam:3", "tp:2"]}
#: Ranks: stages at which each of these is read.
READ = {1: [2, 3], 2: [2, 3], 3: [1, 3]}


def names(kind: str) -> list[str]:
    """Of what is saved: RANKS-KIND-STAGE."""
    return [f"{ranks}-{what.replace(':', '-')}" for ranks, all_ in SAVED.items() for what in all_ if kind in what]


@dataclass
class Checkpoints:
    """Of a tiny policy, written by several numbers of ranks at several stages."""

    folder: Path
    argv: Path
    forks: dict[str, str]

    def launch(self, ranks: int, *asked: str) -> dict[str, dict]:
        """What ``workers/resume.py`` finds."""
        out = self.folder / "out.pt"
        launch("resume.py", ranks, self.argv, out, self.folder, *asked, forks=self.forks)
        return torch.load(out, weights_only=True)

    def convert(self, name: str) -> Path:
        """A universal checkpoint by the commands that a user is told, with their programmes from here."""
        made = self.folder / name / "global_step3_universal"
        command = checkpoints._conversion(self.folder / name / "global_step3").replace(
            "python", python_of(self.forks), 1
        )
        subprocess.run(command, shell=True, check=True, capture_output=True, env=clean_environment(**self.forks))
        assert (made.parent / "latest_universal").read_text() == made.name
        return made


@pytest.fixture(scope="module")
def written(tiny: Tiny, forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoints, dict]:
    folder = tmp_path_factory.mktemp("written")
    shutil.copytree(tiny.model, folder / "model")
    config = LlamaConfig.from_pretrained(tiny.model, num_key_value_heads=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    flags = {"actor.model_name_or_path": folder / "model", "bond.eta": 0.1, "actor.adam.weight_decay": 0.1}
    (folder / "flags.json").write_text(json.dumps(to_argv({**recipe_for(tiny), **flags})))
    made = Checkpoints(folder, folder / "flags.json", forks)
    found = {}
    for ranks, runs in SAVED.items():
        done = made.launch(ranks, *(f"save:{run}" for run in runs))
        found |= {f"{ranks}-{run.replace(':', '-')}": done[f"save:{run}"] for run in runs}
    return made, found


def equal(one: dict, other: dict, *parts: str) -> bool:
    return all(torch.equal(one[part][name], value) for part in parts for name, value in other[part].items())


@pytest.mark.parametrize("ranks", READ)
def test_the_anchor_is_read_by_any_ranks_at_any_stage(written: tuple[Checkpoints, dict], ranks: int) -> None:
    made, saved = written
    asked = [f"anchor:adam:{stage}:{name}" for stage in READ[ranks] for name in names("adam")]
    for what, found in made.launch(ranks, *asked).items():
        assert equal(found, saved[what.rpartition(":")[2]], "anchor"), what
    some = next(iter(saved["2-adam-3"]["anchor"]))
    assert not torch.equal(saved["2-adam-3"]["anchor"][some], saved["2-adam-3"]["masters"][some])


def test_the_anchor_of_halves_is_read_by_as_many_halves(written: tuple[Checkpoints, dict]) -> None:
    made, saved = written
    found = made.launch(2, "anchor:tp:2:2-tp-2")["anchor:tp:2:2-tp-2"]
    assert equal(found, saved["2-tp-2"], "anchor")
    found = made.launch(1, "anchor:adam:2:2-tp-2")["anchor:adam:2:2-tp-2"]
    assert "another --ds.tensor_parallel_size" in found["error"]


def test_an_anchor_of_0_1_is_read_by_the_same_ranks_at_the_same_stage(written: tuple[Checkpoints, dict]) -> None:
    made, saved = written
    for path in (made.folder / "2-adam-2" / "global_step3").glob("bond_anchor*"):
        state = torch.load(path, weights_only=True)
        del state["pieces"], state["tensor_parallel"]
        older = made.folder / "older" / "global_step3" / path.name
        older.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, older)
    found = made.launch(2, "anchor:adam:2:older", "anchor:adam:3:older")
    assert equal(found["anchor:adam:2:older"], saved["2-adam-2"], "anchor")
    alone = made.launch(1, "anchor:adam:2:older")
    for other in (found["anchor:adam:3:older"], alone["anchor:adam:2:older"]):
        assert "was written by openrlhf-bond 0.1 with 2 ranks at ZeRO stage 2" in other["error"]


def test_stage_1_and_2_resume_each_others(written: tuple[Checkpoints, dict]) -> None:
    made, saved = written
    for what, found in made.launch(2, "again:adam:1:2-adam-2", "again:adam:2:2-adam-1").items():
        parts = ("masters", "exp_avg", "exp_avg_sq", "module", "anchor")
        assert equal(found, saved[what.rpartition(":")[2]], *parts), what


def test_a_converted_checkpoint_resumes_with_other_ranks(written: tuple[Checkpoints, dict]) -> None:
    """By DeepSpeed's own conversion, and by the host's loading with --ds.use_universal_ckpt."""
    made, saved = written
    folders = {name: made.convert(name) for name in ("2-adam-1", "2-adam-2", "2-adam-3", "2-tp-2")}
    jobs = {1: ["adam:2:2-adam-1", "adam:1:2-adam-2", "adam:3:2-adam-3"], 2: ["tp:2:2-tp-2"], 3: ["adam:3:2-adam-3"]}
    for ranks, runs in jobs.items():
        for what, found in made.launch(ranks, *(f"resume:{run}" for run in runs)).items():
            name = what.rpartition(":")[2]
            assert equal(found, saved[name], "masters", "exp_avg", "exp_avg_sq", "module", "anchor"), (ranks, what)
            assert found["steps"] == (3, 3)
            assert found["adam"] == [3, 3]
            assert found["groups"] == saved[name]["groups"] == [0.1, 0.0]
            assert found["told"] == 3  # the host's step, place in the data and so on
    for path in folders["2-adam-2"].glob("bond_anchor*"):
        path.unlink()
    found = made.launch(1, "resume:adam:2:2-adam-2")["resume:adam:2:2-adam-2"]
    assert "which DeepSpeed's conversion leaves behind: copy them" in found["error"]


def test_what_a_cut_short_checkpoint_left_is_in_no_other(written: tuple[Checkpoints, dict]) -> None:
    """Two ranks were killed before ``latest`` was written; one goes on, and what it writes is converted."""
    made, saved = written
    shutil.copytree(
        made.folder / "2-adam-3" / "global_step3", made.folder / "1-adam-3" / "global_step3", dirs_exist_ok=True
    )
    (made.folder / "1-adam-3" / "latest").unlink()
    again = made.launch(1, "save:adam:3")["save:adam:3"]
    assert equal(again, saved["1-adam-3"], "masters", "anchor")
    files = {path.name for path in (made.folder / "1-adam-3" / "global_step3").iterdir()}
    assert len(files) == 4, files  # model, optimiser, anchor and metric
    made.convert("1-adam-3")
    found = made.launch(2, "resume:adam:3:1-adam-3")["resume:adam:3:1-adam-3"]
    assert equal(found, again, "masters", "exp_avg", "exp_avg_sq", "module", "anchor")


def test_a_save_that_is_killed_leaves_one_that_is_whole(written: tuple[Checkpoints, dict]) -> None:
    """Both ranks are killed in the middle of a save, at several moments; only the newest checkpoint is kept."""
    made, _ = written
    cut = 0
    for kill in range(5):
        folder = made.folder / f"killed{kill}"
        asked = (made.argv, made.folder / "out.pt", made.folder, f"loop:adam:2:{folder.name}")
        children = start("resume.py", 2, *asked, forks=made.forks)
        latest = folder / "latest"
        deadline = time.monotonic() + 120
        while not (latest.is_file() and len(list(folder.glob("global_step*"))) > 1):
            assert time.monotonic() < deadline and all(child.poll() is None for child in children)
        time.sleep(0.01 * kill)
        for child in children:
            child.kill()
        for child in children:
            child.communicate()
        cut += [path.name for path in folder.glob("global_step*")] != [latest.read_text()]
    assert cut > 0
    for what, found in made.launch(2, *(f"again:adam:2:killed{kill}" for kill in range(5))).items():
        assert found["told"] == found["digest"], what
        assert found["steps"][0] == found["steps"][1] > 0

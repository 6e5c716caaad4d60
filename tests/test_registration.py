"""Entry points and hooks: what is ambiguous, broken or unknown stops the run and says what it is."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import clean_environment, execute, recipe_for, to_argv


def distribution(site: Path, name: str, group: str, entry: str, version: str = "1.0") -> None:
    """Install a distribution that has nothing but an entry point."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{entry}\n" if group else "")


def dry_run(site: Path, tiny: Any, tmp_path: Path) -> Any:
    argv = [*to_argv(recipe_for(tiny)), "--dry-run"]
    return execute(
        [sys.executable, "-m", "bond_plugin", "train", *argv], tmp_path, PYTHONPATH=str(site), BOND_DEVICE="cpu"
    )


def test_duplicate_name_is_an_error_that_names_both(tiny: Any, tmp_path: Path) -> None:
    distribution(tmp_path / "site", "rival", "openrlhf.advantage_estimators", "jbond = rival:JBOND")
    done = dry_run(tmp_path / "site", tiny, tmp_path)
    assert done.status == 2
    assert "both register 'jbond'" in done.output
    assert "from rival" in done.output
    assert "from openrlhf-bond" in done.output
    assert "Traceback" not in done.output


def test_plugin_that_does_not_import_is_an_error(tiny: Any, tmp_path: Path) -> None:
    distribution(tmp_path / "site", "broken", "openrlhf.plugins", "broken = no_such_module:load")
    done = dry_run(tmp_path / "site", tiny, tmp_path)
    assert done.status == 2
    assert "'broken' in the entry-point group 'openrlhf.plugins'" in done.output
    assert "No module named 'no_such_module'" in done.output


def test_name_of_the_hosts_own_cannot_be_taken(tiny: Any, tmp_path: Path) -> None:
    distribution(tmp_path / "site", "taker", "openrlhf.advantage_estimators", "rloo = taker:RLOO")
    done = dry_run(tmp_path / "site", tiny, tmp_path)
    assert done.status == 2
    assert "registers rloo, which is a name of the host's own" in done.output


def test_other_version_of_the_host_is_refused(tiny: Any, tmp_path: Path) -> None:
    distribution(tmp_path / "site", "openrlhf", "", "", version="0.12.0")
    done = dry_run(tmp_path / "site", tiny, tmp_path)
    assert done.status == 2
    assert "OpenRLHF 0.12.0 is installed, but openrlhf-bond supports 0.11.0, 0.11.1, 0.11.2" in done.output


@pytest.mark.parametrize(("change", "says"), [
    (("def broadcast_to_vllm(self) -> None:", "def broadcast_to_vllm(self, tags=None) -> None:"),
     "has the parameters (self, tags) where (self) were expected"),
    (("def train_step(self,", "def one_step(self,"), "it does not exist there"),
    (("def prepare_datasets(strategy, tokenizer)", "def prepare_datasets(strategy)"), "(strategy) where"),
], ids=["parameters", "missing", "called only"])  # fmt: skip
def test_symbol_that_differs_is_named(tiny: Any, tmp_path: Path, change: tuple[str, str], says: str) -> None:
    (installed,) = importlib.util.find_spec("openrlhf").submodule_search_locations
    shutil.copytree(installed, tmp_path / "site" / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "site" / "openrlhf" / "trainer" / "ppo_trainer.py"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    done = dry_run(tmp_path / "site", tiny, tmp_path)
    assert done.status not in (0, -1)
    assert "cannot attach to openrlhf.trainer.ppo_trainer:" in done.output
    assert says in done.output
    assert "supports OpenRLHF 0.11.0, 0.11.1, 0.11.2" in done.output


def test_loading_twice_and_idle_processes_are_cheap() -> None:
    """A worker that never imports the host must not pay for it."""
    probe = (
        "import sys; from bond_plugin.host import load_plugins; load_plugins(); load_plugins();"
        "heavy = {'torch', 'openrlhf', 'ray', 'vllm', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", probe], env=clean_environment(BOND_DEVICE="cpu"), check=True)

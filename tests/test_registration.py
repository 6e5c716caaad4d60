"""Entry points and hooks: what is ambiguous, broken or unknown stops the run and says what it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY, Tiny, clean_environment, execute, recipe_for, to_argv

from bond_plugin import registry
from bond_plugin.host import hooks


def distribution(site: Path, name: str, group: str, entry: str, version: str = "1.0") -> None:
    """Install a distribution that has nothing but an entry point."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{entry}\n" if group else "")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, found before all others; what was read of the others is forgotten."""
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    registry.names.cache_clear()
    yield path
    registry.names.cache_clear()


def test_duplicate_name_is_an_error_that_names_both(dry: Any, site: Path) -> None:
    distribution(site, "rival", "openrlhf.advantage_estimators", "jbond = rival:JBOND")
    done = dry()
    assert done.status == 2
    for words in ("'jbond'", "from rival", "from openrlhf-bond"):
        assert words in done.text
    assert "Traceback" not in done.text


def test_plugin_that_does_not_import_is_an_error(dry: Any, site: Path) -> None:
    distribution(site, "broken", "openrlhf.plugins", "broken = no_such_module:load")
    done = dry()
    assert done.status == 2
    for words in ("'broken'", "'openrlhf.plugins'", "No module named 'no_such_module'"):
        assert words in done.text


def test_name_of_the_hosts_own_cannot_be_taken(dry: Any, site: Path) -> None:
    distribution(site, "taker", "openrlhf.advantage_estimators", "rloo = taker:RLOO")
    done = dry()
    assert done.status == 2
    assert "'openrlhf.advantage_estimators'" in done.text and "rloo" in done.text


def test_other_version_of_the_host_is_refused(dry: Any, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(site, "openrlhf", "", "", version="0.12.0")
    monkeypatch.setattr(hooks, "_armed", False)  # as in a process that has not looked yet
    done = dry()
    assert done.status == 2
    assert "OpenRLHF 0.12.0" in done.text
    assert "0.11.0, 0.11.1, 0.11.2" in done.text


def test_a_host_that_differs_stops_the_command(tiny: Tiny, tmp_path: Path) -> None:
    (installed,) = importlib.util.find_spec("openrlhf").submodule_search_locations
    shutil.copytree(installed, tmp_path / "site" / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "site" / "openrlhf" / "trainer" / "ppo_trainer.py"
    before, after = "def init_checkpoint_states(self)", "def init_checkpoint_states(self, tags=None)"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    command = [sys.executable, "-m", "bond_plugin", "train", *to_argv(recipe_for(tiny)), "--dry-run"]
    done = execute(command, tmp_path, PYTHONPATH=os.pathsep.join((str(tmp_path / "site"), str(REPOSITORY))))
    assert done.status not in (0, -1)
    assert "cannot attach to openrlhf.trainer.ppo_trainer:" in done.output
    assert "(self, tags)" in done.output and "(self)" in done.output
    assert "0.11.0, 0.11.1, 0.11.2" in done.output


@pytest.mark.parametrize(("name", "module", "says"), [
    ("prepare_datasets", SimpleNamespace(prepare_datasets=lambda strategy: None), r"\(strategy\)"),
    ("BasePPOTrainer.train_step", SimpleNamespace(BasePPOTrainer=object), "does not exist"),
], ids=["called only", "missing"])  # fmt: skip
def test_symbol_that_differs_is_named(name: str, module: Any, says: str) -> None:
    (hook,) = (hook for hook in hooks.HOOKS if hook.target == f"openrlhf.trainer.ppo_trainer:{name}")
    with pytest.raises(hooks.HostMismatch, match=rf"ppo_trainer:{name} .*{says}"):
        hooks._install(hook, module)


def test_loading_twice_and_idle_processes_are_cheap() -> None:
    """A worker that never imports the host must not pay for it."""
    probe = (
        "import sys; from bond_plugin.host import load_plugins; load_plugins(); load_plugins();"
        "heavy = {'torch', 'openrlhf', 'ray', 'vllm', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", probe], env=clean_environment(BOND_DEVICE="cpu"), check=True)

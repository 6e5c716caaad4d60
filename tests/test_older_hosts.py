"""The older versions of the host that are supported, each installed beside this environment's other packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import POOLED, Run

#: A flag that 0.11.2 does not know any more.
OLDER = {"algo.advantage.is_correction_type": "tis"}
COMPARED = {"algo.advantage.is_correction_enable": True, "algo.advantage.is_correction_threshold": [0, 100]}


@pytest.mark.e2e
@pytest.mark.parametrize(("version", "flags"), [
    ("0.11.0", {"bond.n_anchor_samples": 2}),
    ("0.11.1", {**POOLED, **COMPARED, "actor.policy_loss_type": "ppo"}),
], ids=["0.11.0 with samples of the anchor", "0.11.1 with the host's loss and correction"])  # fmt: skip
def test_an_older_host_trains(bond: Callable[..., Run], tmp_path: Path, version: str, flags: dict[str, Any]) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*install, f"openrlhf=={version}"], check=True)
    done = bond(tmp_path / "run", {**OLDER, **flags}, PYTHONPATH=str(site))
    assert len(done.metrics) == 3
    assert done.metrics[0]["bond/kl_ref"] == 0 != done.metrics[-1]["bond/kl_ref"]

"""Processes of a run are killed: it ends soon, says why, and leaves nothing behind. More of it: ``make faults``."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Tiny
from running import Running, draw, strike


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(5))
def test_a_killed_process_ends_the_run_and_leaves_nothing(tiny: Tiny, tmp_path: Path, seed: int) -> None:
    fault, moment = draw(seed)
    print(f"{fault}, {moment}")
    with Running(tiny, tmp_path, fault.flags(tiny)) as run:
        print(strike(run, fault, moment))

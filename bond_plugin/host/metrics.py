"""What a run shows: one dictionary a step, to the progress bar, TensorBoard, W&B and ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bond_plugin import recipe as recipes
from bond_plugin.files import ContentError, named, open_file, parse_json, write_json, write_whole
from bond_plugin.host import state, watch
from bond_plugin.offline.prompts import CONFIGURATION

_SHOWN = {
    "reward/policy": "reward",
    "bond/win_rate": "win",
    "bond/log_quantile": "log_q",
    "bond/kl_anchor": "kl_anchor",
    "bond/kl_ref": "kl_ref",
    "actor_grad_norm": "grad",
}
_NUMBERS = (int, float, type(None))  # as JSON has them; true is none
_latest: dict[str, float] = {}


class ProgressBar(tqdm):
    """The host's bar over prompts, with the latest metrics beside it."""

    def update(self, n: float | None = 1) -> bool | None:
        shown = {short: _latest[name] for name, short in _SHOWN.items() if name in _latest}
        if shown:
            self.set_postfix(shown, refresh=False)
        return super().update(n)


class MetricsFile:
    """``<ckpt.output_dir>/metrics.jsonl``: one JSON object a step, with ``step`` and everything that is logged.

    Beside it ``run.json`` says what the run was: the host's nested arguments, for ``bond evaluate``. A resumed run
    goes on in the same file, without the lines of steps that it repeats. A new run in a folder that has one sets the
    old one aside under its time, and loses nothing.
    """

    def __init__(self, args: Any) -> None:
        self.path = Path(args.ckpt.output_dir) / "metrics.jsonl"
        self._args = args
        self._ready = False

    def resume(self, step: int) -> None:
        """Keep what was written up to ``step`` (0: a new run)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._ready = True
        write_json(self.path.with_name(CONFIGURATION), recipes.plain(self._args))
        if not self.path.exists():
            return
        if step == 0:
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.path.stat().st_mtime))
            aside = self.path.with_name(f"metrics.{stamp}.jsonl")
            while aside.exists():
                aside = aside.with_stem(f"{aside.stem}.1")
            self.path.rename(aside)
            return
        write_whole(self.path, b"".join(line for number, _, line in _lines(self.path) if number <= step))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one step.

        Raises:
            OSError: the disk is full, or the like; it names the file.
        """
        if not self._ready:
            self.resume(step - 1)
        numbers = {name: _number(value) for name, value in sorted(values.items()) if name != "generated_samples"}
        with named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **numbers}) + "\n")


def read(path: str | Path) -> list[dict[str, Any]]:
    """The numbers of each line of a ``metrics.jsonl``, by step; a line cut short by a kill is left out.

    Raises:
        ContentError: another line is no JSON, or none has a step.
        OSError: it cannot be read.
    """
    path = Path(path)
    by_step = {
        step: {name: _number(value) for name, value in values.items() if type(value) in _NUMBERS}
        for step, values, _ in _lines(path)
    }
    if not by_step:
        raise ContentError(f"{path} has no line with a step: did the run log one?")
    return [by_step[step] for step in sorted(by_step)]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """Steps, and what their lines say and are in the file, without a last one that a kill cut short."""
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                values = parse_json(line, finite=False)
            except ValueError as error:
                raise ContentError(f"{path}, line {number} {error}") from error
            step = values.get("step") if isinstance(values, dict) else None
            if type(step) is int:
                yield step, values, line


def _number(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def train_step(original: Any, self: Any, rollout_samples: Any, global_step: int) -> tuple[dict, int]:
    """Add what the experience maker measured to what the host reports. Its statistics are of the policy's samples."""
    kept = state.of(self)
    kept.step = global_step
    status, kept.step = original(self, rollout_samples, global_step)
    if kept.engines is not None:
        kept.engines.holding = "policy"  # which the host has sent, for the next rollout or an evaluation
    if kept.policy_samples:
        status |= self._compute_rollout_stats(kept.policy_samples)
    return status | kept.metrics, kept.step


def save_logs_and_checkpoints(
    original: Any, self: Any, global_step: int, logs_dict: Any = None, client_states: Any = None
) -> None:
    """Write the step's line, then let the host log and save; and stop here if the run is to end with a checkpoint."""
    logs = dict(logs_dict or {}) | state.of(self).timings
    _latest.clear()
    _latest.update({name: value for name, value in logs.items() if isinstance(value, (int, float))})
    state.of(self).log.write(global_step, logs)
    ckpt = self.args.ckpt
    stops = ckpt.save_on_stop and watch.asked_to_stop()
    if stops:
        ckpt.save_steps = 1  # so the host saves this one too
    original(self, global_step, logs, client_states)
    if stops:
        for logger in filter(None, (self.wandb_logger, self.tensorboard_logger)):
            logger.close()
        watch.stop_at(f"global_step{global_step}")

"""Checkpoints that a kill cannot take away: save, then name the new one the latest, then delete old ones.

The host deletes before it saves, by number and by metric, so that a kill in between can leave nothing, or a
``latest`` that names a folder that is gone. What is written here has the host's layout. Policy and critic have a
folder each, with a ``latest`` each; a run resumes from the newest checkpoint that both have.
"""

from __future__ import annotations

import errno
import gc
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bond_plugin.files import write_whole
from bond_plugin.host import state, weights
from bond_plugin.host.weights import CheckpointError

_LATEST = "latest"
_UNIVERSAL = "latest_universal"  # the same of what DeepSpeed's conversion made of a checkpoint
_ANCHOR = "bond_anchor_rank_{}.pt"
_FOLDERS = ("_actor", "_critic")  # of a run, in --ckpt.path
_FULL = 2**26  # bytes: a disk with no more room than this is full


def save_ckpt(original: Any, self: Any, model: Any, save_dir: str, tag: str, max_num: int = 3, max_mem: float = 1000,
              client_state: dict | None = None, metric_value: float | None = None,
              metric_key: str | None = None) -> None:  # fmt: skip
    """The host's ``save_ckpt`` in another order, and with the anchor. ``max_mem`` is in GiB. Collective.

    Raises:
        CheckpointError: the disk is full.
    """
    folder = Path(save_dir, tag)
    if self.is_rank_0() and folder.is_dir() and tag not in _named(self.args, folder.parent):
        # Cut short, by another number of ranks perhaps: a conversion would take their files for these ranks'.
        shutil.rmtree(folder)
    dist.barrier()
    try:
        model.save_checkpoint(save_dir, tag=tag, client_state=client_state or {}, save_latest=False)
        kept = weights.of(model)
        if kept is not None and "anchor" in kept:
            path = anchor_file(folder, dist.get_rank())
            torch.save(kept.anchor_state(), f"{path}.part")
            os.replace(f"{path}.part", path)
        if self.is_rank_0():
            self._write_ckpt_metric(str(folder), metric_value, metric_key=metric_key)
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(save_dir).free < _FULL:
            raise CheckpointError(
                f"{folder}: No space left on device, so it was not saved. Checkpoints saved before are whole"
            ) from error
        if isinstance(error, OSError):
            error.filename = error.filename or str(folder)
        raise
    dist.barrier()
    if self.is_rank_0():
        write_whole(Path(save_dir, _LATEST), tag)
        for old in _superfluous(self, Path(save_dir), tag, max_num, max_mem * 2**30):
            shutil.rmtree(old)
            self.print(f"Deleted checkpoint {old}")
    dist.barrier()
    gc.collect()


def _superfluous(strategy: Any, folder: Path, saved: str, max_num: int, max_bytes: float) -> list[Path]:
    """Which checkpoints go, by the host's rules: beyond ``max_num``, or together larger than ``max_bytes``.

    First those without a metric, then those with the worst, and the oldest of these. Of the best ones only the
    newest stays, and it does not count. What was just saved and what any ``latest`` names always stays.
    """
    named = {saved, *_named(strategy.args, folder)}
    there = [path for path in folder.iterdir() if path.is_dir()]
    best = [path for path in there if path.name.startswith("best")]
    regular = [path for path in there if not path.name.startswith("best")]
    gone = [path for path in best if saved.startswith("best") and path.name not in named]

    def worth(path: Path) -> tuple[bool, float, float]:
        metric = strategy._read_ckpt_metric(str(path))
        return metric is not None, metric if metric is not None else 0.0, path.stat().st_mtime

    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in there}
    number, size = len(regular), sum(sizes[path] for path in there if path not in gone)
    for path in sorted((path for path in regular if path.name not in named), key=worth):
        if number <= max_num and size <= max_bytes:
            break
        gone.append(path)
        number, size = number - 1, size - sizes[path]
    return gone


def anchor_file(folder: Path, rank: int) -> str:
    """Where a rank's part of the anchor is, in a checkpoint's folder."""
    return str(folder / _ANCHOR.format(f"{rank:05d}"))


def _anchor_states(folder: Path) -> list[dict[str, Any]]:
    """What the ranks that wrote a checkpoint left of the anchor. The files are mapped: what is not used is not read.

    Raises:
        CheckpointError: a file is missing, not whole, or of another checkpoint.
    """
    states: list[dict[str, Any]] = []
    while not states or len(states) < states[0]["ranks"]:
        path = anchor_file(folder, len(states))
        try:
            states.append(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"the checkpoint {folder} holds no anchor ({path} is missing): it was written by another algorithm, "
                "or converted without its bond_anchor_rank_*.pt, which DeepSpeed's conversion leaves behind: copy "
                "them from the checkpoint that was converted. Or start without --ckpt.load_enable"
            ) from error
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} is not whole: resume from another checkpoint, or copy it again") from error
        if states[-1]["ranks"] != states[0]["ranks"]:
            raise CheckpointError(f"{path} was written by another run than {anchor_file(folder, 0)}")
    return states


def _named(args: Any, folder: Path, names: tuple[str, ...] = (_LATEST, _UNIVERSAL)) -> list[str]:
    """What ``latest`` names in this folder and, where a run has a critic, in the other one of the two."""
    both = folder.name in _FOLDERS and args.critic.model_name_or_path
    files = [folder.with_name(part) / name for part in (_FOLDERS if both else (folder.name,)) for name in names]
    return [path.read_text(encoding="utf-8", errors="replace").strip() for path in files if path.is_file()]


def latest(args: Any, folder: Path, universal: bool = False) -> str | None:
    """The checkpoint to resume from: the newest that policy and critic both have; ``None`` if there is none yet.

    In the folder of one of the two; with ``universal`` of those that DeepSpeed's conversion made.

    Raises:
        CheckpointError: ``latest`` names a folder that is not there.
    """
    file = _UNIVERSAL if universal else _LATEST
    if not (folder / file).is_file():
        return None
    named = sorted(_named(args, folder, (file,)), key=_step)
    for tag in named:
        if tag.strip(".") and os.sep not in tag and os.path.isdir(folder / tag):
            return tag
    there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
    raise CheckpointError(
        f"{folder / file} names {named[0][:80]}, which is not there (there are: {there}). Write the name of a "
        "whole checkpoint into that file, or start without --ckpt.load_enable"
    )


def _step(tag: str) -> int:
    found = re.search(r"\d+", tag)
    return int(found.group()) if found else 0


def problems(args: Any) -> list[str]:
    """Why this run's ranks cannot resume at its ZeRO stage from what is in ``--ckpt.path``, and what to do."""
    found = []
    for name, part in zip(_FOLDERS, (args.actor, args.critic), strict=True):
        if part is args.critic and not part.model_name_or_path:
            continue
        try:
            found += _misfits(args, Path(args.ckpt.path, name), part)
        except CheckpointError as error:
            found.append(f"--ckpt.load_enable: {error}")
    return found


def _misfits(args: Any, folder: Path, part: Any) -> Iterator[str]:
    ranks = part.num_nodes * part.num_gpus_per_node
    newest = latest(args, folder)
    tag = latest(args, folder, universal=True) if args.ds.use_universal_ckpt else newest
    if newest is not None and _step(tag or "") < _step(newest):
        yield f"--ds.use_universal_ckpt: {folder / newest} is not converted: {_conversion(folder / newest)}"
    elif tag is not None:
        path, third = folder / tag, args.ds.zero_stage == 3
        written = len(list(path.glob("*_optim_states.pt")))  # 0: it is converted
        if any(path.glob("mp_rank_*_model_states.pt" if third else "zero_pp_rank_*_model_states.pt")):
            then = "1 or 2" if third else "3"
            yield (
                f"--ds.zero_stage {args.ds.zero_stage}: {path} was written at stage {then}, and DeepSpeed reads it "
                "at no other, converted or not"
            )
        elif written not in (0, ranks):
            fix = f"add --ds.use_universal_ckpt, and convert it: {_conversion(path)}"
            if part.optim == "muon":
                fix = f"use {written}: DeepSpeed does not convert Muon's states"
            yield f"{path} was written by {written} ranks, and this run has {ranks}: {fix}"


def _conversion(source: Path) -> str:
    """The commands that make a universal checkpoint of one. DeepSpeed's does not know of our files."""
    made = source.with_name(f"{source.name}_universal")
    command = (
        "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
        f"--input_folder {source} --output_folder {made}"
    )
    ours = f" && cp {source}/{_ANCHOR.format('*')} {made}" if any(source.glob(_ANCHOR.format("*"))) else ""
    return command + ours


def load_ckpt(original: Any, self: Any, model: Any, load_dir: str, tag: str | None = None, **kwargs: Any) -> Any:
    """Resuming takes the anchor from the checkpoint, never from the pretrained model. Collective.

    Raises:
        CheckpointError: see :func:`latest`; or it holds no anchor for this rank.
    """
    universal = self.args.ds.use_universal_ckpt
    tag = tag or latest(self.args, Path(load_dir), universal)
    if tag is None:
        self.print(f"bond: note: {load_dir} holds no whole checkpoint: the run starts at step 0")
        # What the host says of a run without one. (An asynchronous run asks for it past the hook below.)
        return None, {"episode": 0, "global_step": 0, "total_consumed_prompts": 0, "data_loader_state_dict": {}}
    optimizer = weights.engine_of(model).optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    decays = [group["weight_decay"] for group in inner.param_groups]
    load_path, states = original(self, model, load_dir, tag, **kwargs)
    if universal:  # which under ZeRO-3 brings all groups the first one's decay
        for group, decay in zip(inner.param_groups, decays, strict=True):
            group["weight_decay"] = decay
    for each in inner.state.values():
        if "momentum_buffer" in each:  # Muon's comes in the masters' type; ZeRO-1 and 2 make it in the gradients'
            each["momentum_buffer"] = each["momentum_buffer"].to(optimizer.gradient_accumulation_dtype)
    kept = weights.of(model)
    if kept is not None and "anchor" in kept and load_path is not None:
        folder = Path(load_dir, tag)
        kept.load_anchor(_anchor_states(folder), str(folder))
    return load_path, states


def init_checkpoint_states(original: Any, self: Any) -> dict:
    """Resuming: the step, and with it all seeds, go on where the checkpoint was written."""
    states, kept = original(self), state.of(self)
    kept.step = states["global_step"]
    kept.log.resume(kept.step)
    return states

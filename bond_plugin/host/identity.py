"""What the run is whose checkpoints a folder holds, so that no other one goes on with them.

A checkpoint has the place in the data, and the weights and the optimiser that have seen it. With other prompts it
would pass over some of them; with another initial policy the KL and the pull would be to other weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin import recipe as recipes
from bond_plugin.files import ContentError, write_json
from bond_plugin.host import inputs
from bond_plugin.offline import fingerprints
from bond_plugin.schema import Open, read_model

_FILE = "bond_run.json"
#: Flags that say at which prompt a run is after so many steps.
_DATA = (
    "data.prompt_dataset",
    "data.prompt_probs",
    "data.prompt_split",
    "data.input_key",
    "data.label_key",
    "data.apply_chat_template",
    "data.input_template",
    "data.max_samples",
    "rollout.batch_size",
    "train.seed",
)
#: Flags that may well change, of which a line tells.
_TOLD = ("algo", "bond", "actor.adam", "actor.policy_loss_type", "reward", "rollout", "train.batch_size")
#: Flags among these that change nothing of a run.
_NOTHING = ("bond.strict", "bond.require_checkpoint", "bond.device", "reward.timeout")


class _Run(Open):
    """What :func:`write` says of a run."""

    flags: dict[str, Any]
    prompts: dict[str, str | None]
    model: dict[str, str | None]
    rewards: dict[str, str | None]


def of(args: SimpleNamespace) -> dict[str, Any]:
    """What a run is: flags as dotted names, and contents by path."""
    flat: dict[str, Any] = {}
    recipes.flatten(recipes.plain(args), flat)
    flags = {name: value for name, value in flat.items() if name in _DATA or name.startswith(_TOLD)}
    for name in _NOTHING:
        flags.pop(name, None)
    files = filter(os.path.isfile, inputs.data_sets(args, "data.prompt_dataset"))
    return {
        "flags": flags,
        "prompts": {name: fingerprints.of_file(name) for name in files},
        "model": {args.actor.model_name_or_path: fingerprints.of_model(args.actor.model_name_or_path)},
        "rewards": {url: fingerprints.of_file(url) for url in args.reward.remote_url or [] if Path(url).is_file()},
    }


def has_checkpoint(args: SimpleNamespace) -> bool:
    """Whether ``--ckpt.path`` holds a whole checkpoint."""
    return any(Path(args.ckpt.path, "_actor").glob("latest*"))  # or one that DeepSpeed has converted


def check(args: SimpleNamespace, now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Why a resumed run, ``now``, cannot go on with the checkpoints in ``--ckpt.path``, and what else differs."""
    path = Path(args.ckpt.path, _FILE)
    try:
        known = read_model(path, _Run) if has_checkpoint(args) else None
    except ContentError as error:
        return [f"--ckpt.load_enable: {error}; remove it if these are checkpoints of this run"], []
    if known is None:
        return [], []
    then = known.model_dump()
    problems, notes = [], []
    for name in sorted({*then["flags"], *now["flags"]}):
        before, after = then["flags"].get(name), now["flags"].get(name)
        if before != after:
            line = f"--{name} was {before} and is {after}"
            (problems if name in _DATA else notes).append(line)
    for kind, listed in (("prompts", problems), ("model", problems), ("rewards", notes)):
        for name, content in now[kind].items():
            known = then[kind].get(name)
            if None not in (known, content) and known != content:
                listed.append(f"{name} has another content")
        if kind == "model" and now[kind].keys() != then[kind].keys():
            problems.append(f"--actor.model_name_or_path was {', '.join(then[kind])}")
    if problems:
        problems.append(
            f"so the checkpoints in {args.ckpt.path} are another run's. Give another --ckpt.path; or, to go on all "
            f"the same, remove {path}"
        )
    return [f"--ckpt.load_enable: {line}" for line in problems], [f"--ckpt.load_enable: {line}" for line in notes]


def write(args: SimpleNamespace, now: dict[str, Any]) -> None:
    """Say in ``--ckpt.path`` what this run is."""
    Path(args.ckpt.path).mkdir(parents=True, exist_ok=True)
    write_json(Path(args.ckpt.path, _FILE), now)

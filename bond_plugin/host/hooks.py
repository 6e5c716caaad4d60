"""Everything that is attached to the host: one line each, checked when it is installed.

A hook names a function of the host, the parameters it must have, and our function that is called in its
place with the original as first argument. It is *armed* until the host imports the module, *installed*
afterwards. If the host's function is missing or has other parameters, or the host has another version,
installing raises :class:`HostMismatch`, which names the symbol: nothing ever trains with a hook missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bond_plugin.host import cpu, on_cpu

SUPPORTED_HOST = ("0.11.0", "0.11.1", "0.11.2")
_LISTED = ", ".join(SUPPORTED_HOST)


class HostMismatch(RuntimeError):
    """The installed host is not one that these hooks were written for."""


@dataclass(frozen=True)
class Hook:
    """One attachment.

    Attributes:
        target: ``module:qualified.name`` in the host.
        parameters: the names that the target's parameters must have, in order; ``None`` replaces a name that
            is not a function.
        ours: ``module:name``, in this package, of the function called instead, with the original as first argument;
            ``None`` for what is called and not replaced, which is checked like the others.
        per_object: checked when the module is imported, but put on each object by :func:`attach`. For the
            methods of the trainer: Ray copies them into the class it makes of it, past what is set on the base.
    """

    target: str
    parameters: tuple[str, ...] | None
    ours: str | None
    per_object: bool = False

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def cpu(self) -> bool:
        """Whether it is for machines without GPU only."""
        return self.ours is not None and self.ours.startswith("cpu:")


#: A module; below it what we rely on, with its parameters; and after => what of ours is called in its place, that of
#: ``cpu`` on machines without GPU only.
_TABLE = """
openrlhf.utils.config
    hierarchize(args) => flags:remember_arguments
ray
    init => launch:ray_init
openrlhf.trainer.ray.vllm_engine
    create_vllm_engines(num_engines, tensor_parallel_size, pretrain, seed, full_determinism,
        enable_prefix_caching, enforce_eager, max_model_len, shared_pg, gpu_memory_utilization, vllm_enable_sleep,
        logprobs_mode, agent_func_path, remote_rm_url, max_images_per_prompt) => sampling:create_vllm_engines
openrlhf.trainer.ray.launcher
    RayActorGroup.__init__(self, num_nodes, num_gpus_per_node, ray_actor_type, pg, num_gpus_per_actor,
        duplicate_actors, resources, num_resources_per_node) => log_probs:group_init
    BaseModelActor.execute_batch(self, method_name, all_data, start_idx, end_idx) => log_probs:execute_batch
openrlhf.trainer.ppo_trainer
    tqdm => metrics:ProgressBar
    BasePPOTrainer.__init__(self, strategy, actor_model_group, critic_model_group, reward_model_group,
        reference_model_group, vllm_engines, tokenizer) => sampling:trainer_init
    BasePPOTrainer.init_checkpoint_states(self) => checkpoints:init_checkpoint_states on each object
    BasePPOTrainer.train_step(self, rollout_samples, global_step) => metrics:train_step on each object
    BasePPOTrainer.save_logs_and_checkpoints(self, global_step, logs_dict, client_states) =>
        metrics:save_logs_and_checkpoints on each object
    prepare_datasets(strategy, tokenizer)
    BasePPOTrainer._compute_rollout_stats(self, experiences)
openrlhf.trainer.ppo_utils.samples_generator
    SamplesGenerator.generate_samples(self, generate_kwargs) => sampling:generate_samples
    SamplesGenerator._process_response_into_experience(self, response, generate_kwargs) => rewards:settle
    _collect_prompt_batch(dataloader_iter, num_prompts)
openrlhf.trainer.ppo_utils.experience_maker
    RemoteExperienceMaker.make_experience_batch(self, rollout_samples) => advantages:make_experience_batch
    RemoteExperienceMaker._dispatch_forward(self, group, sync_condition, kwargs) => log_probs:dispatch_forward
    RemoteExperienceMaker._flatten_results(self, refs, duplicate_factor) => log_probs:flatten_results
    RemoteExperienceMaker.compute_advantages_and_returns(self, experiences) =>
        advantages:compute_advantages_and_returns
    RemoteExperienceMaker.get_cumulative_returns(self, rewards, action_mask, gamma) =>
        advantages:cumulative_returns
    RemoteExperienceMaker.split_rollout_samples(self, rollout_samples)
openrlhf.utils.deepspeed.deepspeed
    DeepspeedStrategy.setup_distributed(self, timeout) => loss:setup_distributed
    DeepspeedStrategy._ds_init_train_model(self, model, cfg) => weights:init_train_model
    DeepspeedStrategy.save_ckpt(self, model, save_dir, tag, max_num, max_mem, client_state, save_latest,
        metric_value, metric_key) => checkpoints:save_ckpt
    DeepspeedStrategy.load_ckpt(self, model, load_dir, tag, load_module_strict, load_optimizer_states,
        load_lr_scheduler_states, load_module_only) => checkpoints:load_ckpt
    DeepspeedStrategy.save_model(self, model, tokenizer, output_dir, kwargs) => weights:save_model
    DeepspeedStrategy.get_ds_train_config(self, optim_dict, max_norm) => cpu:torch_adam
    DeepspeedStrategy.moving_average(self, model, model_ema, beta, device) => cpu:moving_average
openrlhf.models.actor
    Actor.forward(self, sequences, action_mask, attention_mask, return_output, allgather_logits, return_logprobs,
        ring_attn_group, packed_seq_lens, return_entropy, mm_inputs) => logits:forward
    log_probs_from_logits(logits, labels, temperature) => logits:log_probs_from_logits
    compute_entropy(logits) => logits:compute_entropy
openrlhf.utils.deepspeed.deepspeed_utils
    offload_deepspeed_states(model, pin_memory, non_blocking) => weights:move_states
    reload_deepspeed_states(model, non_blocking) => weights:move_states
openrlhf.trainer.ray.ppo_actor
    ActorPPOTrainer.ppo_train(self, kl_ctl) => loss:ppo_train
    ActorPPOTrainer.broadcast_to_vllm(self) => sync:broadcast_to_vllm
    ActorPPOTrainer.training_step(self, experience, kl_ctl, step, loss_batch_info) => loss:training_step
openrlhf.trainer.ray.ppo_critic
    CriticPPOTrainer.training_step(self, experience, step, loss_batch_info) => classifier:training_step
openrlhf.trainer.ppo_utils.replay_buffer
    NaiveReplayBuffer.setup_dynamic_batch(self, strategy) => loss:setup_dynamic_batch
    NaiveReplayBuffer.__init__(self, sample_batch_size, limit, cpu_offload, packing_samples, dynamic_batch) =>
        cpu:replay_buffer_init
openrlhf.utils.agent
    SingleTurnAgentExecutor.execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine,
        images) => rewards:execute
    SingleTurnAgentExecutor._fetch_rewards_via_func(self, queries_list, prompts_list, labels_list) =>
        rewards:fetch
    SingleTurnAgentExecutor._fetch_rewards_via_http(self, queries_list, prompts_list, labels_list) =>
        rewards:fetch
openrlhf.trainer.ray.vllm_worker_wrap
    WorkerWrap.update_weight(self, name, dtype, shape, empty_cache) => sync:update_weight
openrlhf.trainer.ppo_utils.length_penalty
    apply_length_penalties(experiences, args)
openrlhf.trainer.ppo_utils.experience
    make_experience_batch(items, packing_samples)
    split_experience_batch(experience)
openrlhf.datasets.prompts_dataset
    PromptDataset.__init__(self, dataset, tokenizer, strategy, input_template)
openrlhf.utils.utils
    get_tokenizer(pretrain, model, padding_side, strategy, use_fast)
    convert_to_torch_dtype(param_dtype) => cpu:torch_dtype
openrlhf.utils.distributed_util
    stateless_init_process_group(master_address, master_port, rank, world_size, device) => cpu:GlooGroup
deepspeed.comm.torch
    build_shm_op() => cpu:no_shm_op
deepspeed.runtime.zero.partition_parameters
    Init._allgather_params_coalesced(self, param_list, hierarchy, quantize) => cpu:gather_one_by_one
vllm.model_executor.layers.utils
    dispatch_cpu_unquantized_gemm(layer, remove_weight) => cpu:live_linear
"""
_LINE = re.compile(r"([\w.]+)(?:\((.*)\))?(?: => (\S+))?( on each object)?")


def _read() -> Iterator[Hook]:
    for line in re.sub(r"\n {8}", " ", _TABLE).strip().splitlines():
        if not line.startswith(" "):
            module = line
            continue
        name, parameters, ours, each = _LINE.fullmatch(line.strip()).groups()
        names = None if parameters is None else tuple(re.findall(r"\w+", parameters))
        yield Hook(f"{module}:{name}", names, ours, each is not None)


HOOKS: tuple[Hook, ...] = tuple(_read())

_MODULES = frozenset([*(hook.module for hook in HOOKS), cpu.NEEDS_FLASH_ATTN, "torch"])
_RAY_PARAMETER = "_ray_trace_ctx"  # added by Ray to the methods of an actor's class

_installed: set[str] = set()
_armed = False

#: Whether this process only checks a command line, so that flash-attn, which runs on GPUs need, may be missing.
only_checks = False


def arm() -> None:
    """Install the hooks of modules that are imported already, and the others when they will be.

    Raises:
        HostMismatch: the installed host has another version, or other symbols.
    """
    global _armed
    if _armed:
        return
    check_version()
    _armed = True
    from bond_plugin.host import flags

    flags.extend_parsers()
    sys.meta_path.insert(0, _Finder())
    for module in (sys.modules[name] for name in _MODULES if name in sys.modules):
        if not getattr(module.__spec__, "_initializing", False):
            _install_module(module)


def check_version() -> None:
    """Raises :class:`HostMismatch` unless the installed OpenRLHF is a supported one."""
    try:
        version = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError:
        raise HostMismatch(
            f"OpenRLHF is not installed. openrlhf-bond works with OpenRLHF {_LISTED}: "
            f"pip install openrlhf=={SUPPORTED_HOST[-1]}"
        ) from None
    if version not in SUPPORTED_HOST:
        raise HostMismatch(
            f"OpenRLHF {version} is installed, but openrlhf-bond supports {_LISTED}. Install a supported "
            f"version: pip install openrlhf=={SUPPORTED_HOST[-1]}"
        )


def policy_loss_values() -> int:
    """How many values the host expects of its policy loss."""
    return 5 if importlib.metadata.version("openrlhf") == "0.11.2" else 4


def check_all() -> None:
    """Import every hooked module of the host and so install (and check) every hook, before Ray starts."""
    for hook in _active():
        if hook.module.startswith("openrlhf."):
            importlib.import_module(hook.module)


def states() -> Iterator[tuple[str, str]]:
    """Each hook's target and its state, for ``--dry-run``."""
    for hook in _active():
        done = "installed" if hook.ours is not None else "checked"
        yield hook.target, done if hook.target in _installed else "armed (waits for the import)"


def _active() -> Iterator[Hook]:
    return (hook for hook in HOOKS if on_cpu() or not hook.cpu)


def _install_module(module: ModuleType) -> None:
    if module.__name__ == "torch" and on_cpu() and "torch" not in _installed:
        cpu.patch_torch()
        _installed.add("torch")
    for hook in _active():
        if hook.module == module.__name__ and hook.target not in _installed:
            _install(hook, module)
            _installed.add(hook.target)


def _install(hook: Hook, module: ModuleType) -> None:
    *path, name = hook.target.partition(":")[2].split(".")
    owner: Any = module
    try:
        for part in path:
            owner = getattr(owner, part)
        original = inspect.getattr_static(owner, name) if path else getattr(owner, name)
    except AttributeError:
        raise _mismatch(hook, "it does not exist there") from None
    if hook.parameters is not None:
        found = inspect.signature(original).parameters if callable(original) else ()
        found = tuple(name for name in found if name != _RAY_PARAMETER)
        if found != hook.parameters:
            parameters, expected = ", ".join(found), ", ".join(hook.parameters)
            raise _mismatch(hook, f"it has the parameters ({parameters}) where ({expected}) were expected")
    if hook.per_object or hook.ours is None:
        return
    ours = replacement = _ours(hook)
    if callable(original) and not isinstance(original, type):

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return ours(original, *args, **kwargs)

    setattr(owner, name, replacement)


def attach(trainer: Any) -> None:
    """Put the ``per_object`` hooks, which are all of the host's trainer, on one."""
    for hook in _active():
        if hook.per_object:
            name = hook.target.rpartition(".")[2]
            original = getattr(trainer, name).__func__
            setattr(trainer, name, functools.partial(_ours(hook), original, trainer))


def _ours(hook: Hook) -> Callable[..., Any]:
    module, _, name = hook.ours.partition(":")
    return getattr(importlib.import_module(f"bond_plugin.host.{module}"), name)


def _mismatch(hook: Hook, what: str) -> HostMismatch:
    package = hook.module.partition(".")[0]
    owner = "OpenRLHF" if package == "openrlhf" else package
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return HostMismatch(
        f"cannot attach to {hook.target} of {owner} {version}: {what}. openrlhf-bond supports OpenRLHF "
        f"{_LISTED}; install it unmodified (only the additive patch under patches/ is expected)."
    )


class _Finder(importlib.abc.MetaPathFinder):
    """Runs :func:`_install_module` right after one of the hooked modules has been executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        # Every import of the process comes by here, thousands in one that imports the host.
        if name not in _MODULES:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if not isinstance(finder, _Finder))
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        stand_in = name == cpu.NEEDS_FLASH_ATTN and (on_cpu() or _lacks_flash_attn())

        def exec_module(module: ModuleType) -> None:
            with cpu.flash_attn_stand_in() if stand_in else nullcontext():
                execute(module)
            _install_module(module)

        spec.loader.exec_module = exec_module
        return spec


def _lacks_flash_attn() -> bool:
    """Whether the host would fail to import on a machine with GPU. Raises :class:`HostMismatch` if it is to train."""
    if importlib.util.find_spec("flash_attn") is not None:
        return False
    if not only_checks:
        raise HostMismatch(
            "flash-attn is not installed: pip install flash-attn --no-build-isolation; or --bond.device cpu"
        )
    print("bond: note: this machine has no flash-attn, which the run itself needs on a GPU", flush=True)
    return True

"""What is refused before Ray starts: a run that would silently be another algorithm, or fail much later."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

from bond_plugin import registry
from bond_plugin.algorithms.base import Algorithm, RewardTransform
from bond_plugin.host import flags, on_cpu

_HOST_LOSSES = ("ppo", "gspo")


def complete(args: SimpleNamespace, given: frozenset[str], critic: str | None = None) -> list[str]:
    """Fill in what the algorithm and the device imply where the user said nothing; returns notes to print.

    ``critic`` is what the user gave for ``--critic.model_name_or_path``.
    """
    notes: list[str] = []

    def default(dest: str, value: object, why: str) -> None:
        *path, name = dest.split(".")
        node = args
        for part in path:
            node = getattr(node, part)
        if dest not in given and getattr(node, name) != value:
            setattr(node, name, value)
            notes.append(f"--{dest} is {value} ({why})")

    if on_cpu():
        default("vllm.sync_backend", "gloo", "no GPU")
        default("vllm.enforce_eager", True, "no GPU")
        if "flash" in args.ds.attn_implementation:  # what the host insists on when samples are packed
            args.ds.attn_implementation = "sdpa"
            notes.append("--ds.attn_implementation is sdpa (no GPU)")
        for group in ("ref", "critic", "reward"):
            # The host's default of 8 would be 8 processes here.
            if f"{group}.num_gpus_per_node" not in given:
                getattr(args, group).num_gpus_per_node = args.actor.num_gpus_per_node
    algorithm, transform = flags.algorithm(args), flags.transform(args)
    if transform is not None:
        name = args.reward.transform
        default("algo.kl.init_coef", transform.kl_coefficient, f"the KL coefficient of {name}")
        default("reward.clip_range", None, f"the rewards of {name} are logs")
    if algorithm is None:
        return notes
    if algorithm.samples().classifier:
        args.critic.model_name_or_path = critic or args.actor.model_name_or_path
        if "critic.num_gpus_per_node" not in given:
            args.critic.num_gpus_per_node = args.actor.num_gpus_per_node
        if "critic.num_nodes" not in given:
            args.critic.num_nodes = args.actor.num_nodes
        notes.append(f"the quantile's classifier starts from {args.critic.model_name_or_path}; see --critic.*")
    name = args.algo.advantage.estimator
    default("actor.policy_loss_type", algorithm.policy_loss, f"the policy loss of {name}")
    default("algo.kl.init_coef", 0.0, f"{name} has no KL reward; bond/kl_ref needs no reference model")
    ignored = {
        "reward.clip_range": "rewards are used as they are",
        "algo.advantage.gamma": "advantages are of whole responses",
        "algo.advantage.lambd": "advantages are of whole responses",
        "algo.advantage.no_std_norm": "advantages are not normalised",
        "algo.kl.estimator": "there is no KL reward",
    }
    notes += [f"--{dest} has no effect under {name}: {why}" for dest, why in ignored.items() if dest in given]
    return notes


def problems(args: SimpleNamespace, given: frozenset[str]) -> list[str]:
    """Everything that keeps this run from starting, each with the flag and the fix."""
    found = [*_cpu(args), *_files(args)]
    algorithm = flags.algorithm(args)
    loss = args.actor.policy_loss_type
    if loss not in _HOST_LOSSES:
        registry.load(registry.POLICY_LOSSES, loss)
        found += _own_loss(args, loss)
    if algorithm is not None:
        found += _own_estimator(args, algorithm, given)
    transform = flags.transform(args)
    if transform is not None:
        found += _transform(args, transform)
    return found


def _transform(args: SimpleNamespace, transform: RewardTransform) -> list[str]:
    """Settings under which the host's training would not have the transform's optimum."""
    name, coefficient = args.reward.transform, transform.kl_coefficient
    found = []
    if abs(args.algo.kl.init_coef - coefficient) > 1e-6 * coefficient:
        found.append(
            f"--algo.kl.init_coef {args.algo.kl.init_coef} contradicts {flags.TRANSFORM} {name}, whose KL "
            f"coefficient is {coefficient:.6g} (1/(N - 1)): drop the flag, or change N"
        )
    refused = {
        "algo.kl.target": (args.algo.kl.target is not None, "the KL coefficient is fixed by N"),
        "algo.kl.use_loss": (args.algo.kl.use_loss, "the KL belongs into the reward"),
        "algo.kl.estimator": (args.algo.kl.estimator != "k1", "only k1 has the right expectation; use k1"),
        "reward.clip_range": (args.reward.clip_range is not None, "it would clip the transformed reward"),
        "rollout.top_p": (args.rollout.top_p != 1.0, "the samples must come from the whole distribution; use 1.0"),
        "algo.dynamic_filtering_enable": (
            args.algo.dynamic_filtering_enable,
            "it would drop prompts by their reward, which changes the target distribution",
        ),
        "train.agent_func_path": (args.train.agent_func_path is not None, "multi-turn agents: not supported yet"),
        **_penalties(args),
    }
    return found + [
        f"--{dest} cannot be used with {flags.TRANSFORM} {name}: {why}" for dest, (on, why) in refused.items() if on
    ]


def _penalties(args: SimpleNamespace) -> dict[str, tuple[bool, str]]:
    why = "the cached rewards of the initial policy's samples do not have the penalty"
    return {
        "reward.overlong_buffer_len": (args.reward.overlong_buffer_len is not None, why),
        "reward.stop_properly_penalty_coef": (args.reward.stop_properly_penalty_coef is not None, why),
    }


def _cpu(args: SimpleNamespace) -> list[str]:
    if not on_cpu():
        return []
    found = []
    if args.vllm.sync_backend != "gloo":
        found.append(f"--vllm.sync_backend {args.vllm.sync_backend} needs a GPU; use gloo")
    for dest, on in (
        ("ds.adam_offload", args.ds.adam_offload),
        ("vllm.enable_sleep", args.vllm.enable_sleep),
        ("vllm.sync_with_ray", args.vllm.sync_with_ray),
        ("ds.ring_attn_size above 1", args.ds.ring_attn_size > 1),
    ):
        if on:
            found.append(f"--{dest} needs a GPU")
    return found


def _files(args: SimpleNamespace) -> list[str]:
    found = []

    def looks_local(path: str) -> bool:
        return path.startswith((".", "/", "~")) or path.endswith((".json", ".jsonl", ".py", ".csv", ".parquet"))

    if not args.actor.model_name_or_path:
        found.append("--actor.model_name_or_path is missing: a model's name or folder")
    if not args.data.prompt_dataset:
        found.append("--data.prompt_dataset is missing: a data set's name or a .jsonl file of prompts")
    named = {
        "actor.model_name_or_path": [args.actor.model_name_or_path],
        "reward.model_name_or_path": (args.reward.model_name_or_path or "").split(","),
        "critic.model_name_or_path": [args.critic.model_name_or_path],
        "data.prompt_dataset": (args.data.prompt_dataset or "").split(","),
        "eval.dataset": (args.eval.dataset or "").split(","),
    }
    for dest, paths in named.items():
        for path in paths:
            path = (path or "").strip().partition("@")[0]
            if path and looks_local(path) and not Path(path).expanduser().exists():
                found.append(f"--{dest} {path}: no such file or folder")
    for url in args.reward.remote_url or []:
        if url.endswith(".py"):
            found += _reward_file(url)
    if not args.reward.remote_url and not args.reward.model_name_or_path:
        found.append(
            "no reward: give --reward.remote_url (a Python file with reward_func, or a server), or "
            "--reward.model_name_or_path"
        )
    return found


def _reward_file(path: str) -> list[str]:
    try:
        tree = ast.parse(Path(path).read_text(), filename=path)
    except OSError as error:
        return [f"--reward.remote_url {path}: {error.strerror or error}"]
    except SyntaxError as error:
        return [f"--reward.remote_url {path}: {error}"]
    defined = {
        name
        for node in tree.body
        for name in (
            [node.name]
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            else [t.id for t in node.targets if isinstance(t, ast.Name)]
            if isinstance(node, ast.Assign)
            else [alias.asname or alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    if "reward_func" not in defined:
        return [f"--reward.remote_url {path}: it defines no reward_func(queries, prompts, labels)"]
    return []


def _own_loss(args: SimpleNamespace, loss: str) -> list[str]:
    """Modes in which a loss of ours would not be the loss it says."""
    refused = {
        "train.dynamic_batch_enable": (
            args.train.dynamic_batch_enable,
            "under ZeRO-1/2 the host keeps only the last micro-batch's gradient",
        ),
        "ds.ring_attn_size": (args.ds.ring_attn_size > 1, "not supported yet"),
        "ds.tensor_parallel_size": (args.ds.tensor_parallel_size > 1, "not supported yet"),
        "actor.dual_clip": (args.actor.dual_clip is not None, "this loss has no dual clip"),
        "actor.loss_agg_mode": (
            args.actor.loss_agg_mode != "token-mean",
            "this loss is a mean over prompts; leave it at its default",
        ),
        "actor.entropy_coef": (
            bool(args.actor.entropy_coef),
            "it would add an entropy term to the objective",
        ),
        "algo.advantage.is_correction_level": (
            args.algo.advantage.is_correction_level != "off",
            "this loss does not use it; the trainer/engine gap is reported as vllm_kl without it",
        ),
    }
    return [
        f"--{dest} cannot be used with the policy loss {loss}: {why}" for dest, (on, why) in refused.items() if on
    ]


def _own_estimator(args: SimpleNamespace, algorithm: Algorithm, given: frozenset[str]) -> list[str]:
    name = args.algo.advantage.estimator
    wants = algorithm.samples()
    refused = {
        "train.async_enable": (
            args.train.async_enable,
            "not supported yet: anchor and policy share the engines",
        ),
        "train.partial_rollout_enable": (args.train.partial_rollout_enable, "not supported yet"),
        "vllm.enable_sleep": (args.vllm.enable_sleep, "not supported yet"),
        "ds.enable_sleep": (args.ds.enable_sleep, "not supported yet"),
        "train.enable_ema": (
            args.train.enable_ema,
            "the host would save its average instead of the policy; the anchor is an average already "
            "(--bond.save_anchor saves it)",
        ),
        "train.agent_func_path": (
            args.train.agent_func_path is not None,
            "multi-turn agents: not supported yet",
        ),
        "data.max_images_per_prompt": (args.data.max_images_per_prompt > 0, "images: not supported yet"),
        "algo.dynamic_filtering_enable": (
            args.algo.dynamic_filtering_enable,
            "it would drop prompts by their reward, which changes the target distribution",
        ),
        "rollout.vllm_generate_batch_size": (
            args.rollout.vllm_generate_batch_size != args.rollout.batch_size,
            "it must equal --rollout.batch_size: a step uses all its samples",
        ),
        "rollout.top_p": (
            args.rollout.top_p != 1.0,
            "samples must come from the policy itself, not from its truncated distribution; use 1.0",
        ),
        "algo.kl.use_loss": (args.algo.kl.use_loss, "it would add a KL term to the objective"),
        "ds.lora.rank": (args.ds.lora.rank > 0, "not supported yet"),
        "ds.load_in_4bit": (args.ds.load_in_4bit, "not supported yet"),
        "ds.adam_offload": (args.ds.adam_offload, "not supported yet"),
        "ds.use_universal_ckpt": (args.ds.use_universal_ckpt, "the anchor has no universal checkpoint yet"),
        "actor.optim": (
            args.actor.optim != "adam",
            "the anchor follows Adam's fp32 master weights; use adam",
        ),
    }
    found = [f"--{dest} cannot be used with {name}: {why}" for dest, (on, why) in refused.items() if on]
    if not 1 <= args.ds.zero_stage <= 3:
        found.append(f"--ds.zero_stage {args.ds.zero_stage} cannot be used with {name}: use 2 or 3")
    if not args.vllm.num_engines:
        found.append("--vllm.num_engines must be at least 1: samples come from vLLM")
    if args.actor.policy_loss_type != algorithm.policy_loss:
        found.append(
            f"--actor.policy_loss_type {args.actor.policy_loss_type} contradicts {flags.ESTIMATOR} {name}, whose "
            f"loss is {algorithm.policy_loss}: drop the flag"
        )
    if args.algo.kl.init_coef > 0:
        found.append(
            f"--algo.kl.init_coef {args.algo.kl.init_coef} has no place in {name}, which puts no KL into the "
            "reward: drop the flag or set it to 0 (bond/kl_ref is reported without it)"
        )
    if wants.reward_cache:
        penalties = _penalties(args).items()
        found += [f"--{dest} cannot be used with a reward cache: {why}" for dest, (on, why) in penalties if on]
    if wants.classifier:
        ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
        if args.critic.num_nodes * args.critic.num_gpus_per_node != ranks:
            found.append(
                f"--critic.num_gpus_per_node: the classifier needs as many ranks as the policy ({ranks}); drop it"
            )
        if args.train.colocate_critic_reward:
            found.append("--train.colocate_critic_reward cannot be used with a learned quantile yet")
    if wants.trained_companions and algorithm.policy_loss == "ppo":
        found.append(f"{name} trains on companions, so it needs a policy loss of its own, not the host's ppo")
    baseline = getattr(algorithm.config, "baseline", None)
    if baseline == "leave_one_out" and args.rollout.n_samples_per_prompt < 2:
        found.append("--bond.baseline leave_one_out needs --rollout.n_samples_per_prompt 2 or more; or use batch")
    if baseline == "batch" and args.rollout.batch_size * args.rollout.n_samples_per_prompt < 2:
        found.append("--bond.baseline batch needs at least two samples a rollout; use --bond.baseline none")
    return found + _sizes(args, wants.trained_companions)


def _sizes(args: SimpleNamespace, companions: int) -> list[str]:
    n, batch = args.rollout.n_samples_per_prompt, args.train.batch_size
    samples = args.rollout.batch_size * n
    ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    found = []
    if batch % n:
        return [
            f"--train.batch_size {batch} must be a multiple of --rollout.n_samples_per_prompt {n}: it counts "
            "samples of the policy, and an optimiser step takes whole prompts"
        ]
    if samples % batch:
        found.append(
            f"--rollout.batch_size {args.rollout.batch_size} x --rollout.n_samples_per_prompt {n} = {samples} "
            f"samples must be a multiple of --train.batch_size {batch}"
        )
    rows = batch // n * (n + companions)
    if rows % (ranks * args.train.micro_batch_size):
        found.append(
            f"an optimiser step trains on {rows} responses ({batch} samples of the policy and "
            f"{rows - batch} companions), which must be a multiple of --train.micro_batch_size "
            f"{args.train.micro_batch_size} x {ranks} data-parallel ranks"
        )
    forward = args.rollout.batch_size * (n + companions)
    if forward % (ranks * args.rollout.micro_batch_size):
        found.append(
            f"a rollout of {forward} responses must be a multiple of --rollout.micro_batch_size "
            f"{args.rollout.micro_batch_size} x {ranks} data-parallel ranks"
        )
    return found

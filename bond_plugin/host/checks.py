"""What is refused before Ray starts: a run that would silently be another algorithm, or fail much later."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import SimpleNamespace

from bond_plugin import registry
from bond_plugin.algorithms.base import Needs, RewardTransform
from bond_plugin.host import flags, identity, inputs, on_cpu, plan

HOST_LOSSES = ("ppo", "gspo")

_NO_KL = "its KL is its own, see its --bond.* flags (--bond.gamma_ref or kl_coef, to the initial policy)"
#: Flags of the estimator that an algorithm of ours replaces, what they become (``...``: they stay), and why.
_REPLACED: dict[str, tuple[object, str]] = {
    "algo.kl.init_coef": (0.0, _NO_KL),
    "algo.kl.target": (None, _NO_KL),
    "algo.kl.use_loss": (False, _NO_KL),
    "algo.kl.estimator": ("k1", _NO_KL),
    "algo.kl.horizon": (..., _NO_KL),
    "algo.kl.unbiased_gradient": (..., _NO_KL),
    "reward.clip_range": (None, "rewards are taken as they are"),
    "reward.normalize_enable": (..., "rewards are taken as they are"),
    "algo.advantage.gamma": (..., "a response's reward is not discounted"),
    "algo.advantage.lambd": (..., "there are no values"),
    "algo.advantage.no_std_norm": (..., "advantages are the algorithm's own"),
}


#: Values of the host's flags that are in nobody's way. Where a flag is not here, that is not to be given, or off.
_PLAIN: dict[str, tuple[object, ...]] = {
    "actor.entropy_coef": (0,),
    "actor.loss_agg_mode": ("token-mean",),
    "algo.advantage.is_correction_level": ("off",),
    "algo.kl.estimator": ("k1",),
    "data.max_images_per_prompt": (0,),
    "ds.ring_attn_size": (1,),
    "ds.tensor_parallel_size": (1,),
    "ds.zero_stage": (1, 2, 3),
    "rollout.top_p": (1,),
    "vllm.tensor_parallel_size": (1,),
}

# What is refused, and why: flags by the reason that speaks against them.

#: Where no other weights can be kept beside the policy's and put in their place.
_NOT_KEPT = {
    "ds.zero_stage": "without ZeRO there are no fp32 masters to follow; use 2 or 3",
    "ds.deepcompile": "it keeps gathered parameters, past which a swap of weights may not go",
    "ds.load_in_4bit": "4-bit weights cannot be swapped",
}
_OWN_ESTIMATOR = {
    **_NOT_KEPT,
    "rollout.top_p": "samples must come from the policy itself, not from its truncated distribution; use 1.0",
}
#: Where a loss of ours would not be the loss it says.
_OWN_LOSS = {
    "ds.ring_attn_size": "not supported yet",
    "ds.tensor_parallel_size": "not supported yet",
    "actor.dual_clip": "this loss has no dual clip",
    "actor.loss_agg_mode": "this loss is a mean over prompts; leave it at its default",
    "actor.entropy_coef": "it would add an entropy term to the objective",
    "algo.advantage.is_correction_level": "this loss does not use it; the trainer/engine gap is reported as vllm_kl "
    "without it",
}
#: Where samples of other weights cannot be drawn beside the policy's, or trained on.
_DRAWING = {
    "train.async_enable": "anchor and policy share the engines",
    "train.partial_rollout_enable": "anchor and policy share the engines",
    "vllm.enable_sleep": "weights are sent to the engines between two rollouts",
    "ds.enable_sleep": "weights are swapped between two rollouts",
    "train.enable_ema": "the host would save its average instead of the policy; the anchor is an average already "
    "(--bond.save_anchor saves it)",
    "train.agent_func_path": "an agent's turns are the host's to draw",
    "data.max_images_per_prompt": "images are the host's to hand on",
    "algo.dynamic_filtering_enable": "prompts and source samples would not fit",
}
_REWARD_CACHE = {
    "train.agent_func_path": "it holds single-turn responses",
    "reward.overlong_buffer_len": "the cached rewards of the initial policy's samples do not have the penalty",
    "reward.stop_properly_penalty_coef": "the cached rewards of the initial policy's samples do not have the penalty",
}
#: Under a transform that asks for log-probabilities of the reference.
_LOG_RATIOS = {
    "algo.kl.use_loss": "the KL belongs into the reward",
    "algo.kl.estimator": "only k1 has the right expectation; use k1",
}
#: Under a transform whose optimum depends on the KL coefficient.
_OPTIMUM = {
    "algo.kl.target": "the KL coefficient is fixed by the target",
    "reward.clip_range": "it would clip the transformed reward",
    "rollout.top_p": "the samples must come from the whole distribution; use 1.0",
    "algo.dynamic_filtering_enable": "it would drop prompts by their reward, which changes the target distribution",
}


def _given(args: SimpleNamespace, dests: Iterable[str]) -> list[str]:
    """Those of the flags that ask for something."""
    values = {dest: inputs.value(args, dest) for dest in dests}
    given = {dest: value for dest, value in values.items() if value is not None and value is not False}
    return [dest for dest, value in given.items() if value not in _PLAIN.get(dest, ())]


def _refused(args: SimpleNamespace, whys: dict[str, str], under: str, after: str = "") -> list[str]:
    return [f"--{dest} cannot be used with {under}: {whys[dest]}{after}" for dest in _given(args, whys)]


def _set(args: SimpleNamespace, dest: str, value: object) -> None:
    group, _, name = dest.rpartition(".")
    setattr(inputs.value(args, group), name, value)


def loaded(args: SimpleNamespace) -> dict[str, SimpleNamespace]:
    """The groups of workers whose models a run loads, and their flags."""
    groups = {"actor": args.actor}
    if args.algo.kl.init_coef > 0 and not plan.of(args).moving_reference:
        groups["ref"] = args.ref
    if args.critic.model_name_or_path:
        groups["critic"] = args.critic
    if not args.reward.remote_url:
        groups["reward"] = args.reward
    return groups


def complete(args: SimpleNamespace, given: frozenset[str], critic: str | None = None) -> tuple[list[str], list[str]]:
    """Fill in what the algorithm and the device imply where the user said nothing, and set aside what has no meaning.

    Args:
        args: the run's arguments; changed.
        given: the destinations of the flags that the user gave.
        critic: what the user gave for ``--critic.model_name_or_path``.

    Returns:
        Notes to print; and of flags that were given and are set aside, a line each.
    """
    notes: list[str] = []
    aside: list[str] = []

    def default(dest: str, value: object, why: str) -> None:
        if dest not in given and inputs.value(args, dest) != value:
            _set(args, dest, value)
            notes.append(f"--{dest} is {value} ({why})")

    if on_cpu():
        _without_gpu(args, given, notes, aside)
    _absolute_paths(args)
    if args.ckpt.load_enable and not args.bond.require_checkpoint and not identity.has_checkpoint(args):
        notes.append(f"--ckpt.load_enable: {args.ckpt.path} holds no whole checkpoint, so the run starts at step 0")
    run = plan.of(args)
    samples = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    if run.algorithm is None and samples % args.train.batch_size:
        notes.append(
            f"a rollout of {samples} samples is no multiple of --train.batch_size {args.train.batch_size}: the host "
            "carries what is left over, an unfinished gradient, into the next one"
        )
    if run.transform is not None:
        name = args.reward.transform
        if run.transform.kl_coefficient is not None:
            default("algo.kl.init_coef", run.transform.kl_coefficient, f"the KL coefficient of {name}")
        default("reward.clip_range", None, f"it would clip the rewards of {name}")
    if run.algorithm is None:
        return notes, aside
    needs, name = run.needs, args.algo.advantage.estimator
    if needs.classifier:
        args.critic.model_name_or_path = critic or args.actor.model_name_or_path
        _as_many(args, given, "critic", "num_gpus_per_node", "num_nodes")
        notes.append(f"the quantile's classifier starts from {args.critic.model_name_or_path}; see --critic.*")
    default("actor.policy_loss_type", run.algorithm.policy_loss, f"the policy loss of {name}")
    if needs.least > 1:
        default(
            "rollout.n_samples_per_prompt",
            max(8, needs.least),
            f"{name} compares a prompt's samples with one another; {needs.least} is the least",
        )
    for dest, (value, why) in _REPLACED.items():
        was = inputs.value(args, dest)
        if dest == "algo.kl.init_coef" and run.taught:
            value = 1.0  # any above 0: the host then has a reference model, here the teacher
        if value is not ... and was != value:
            _set(args, dest, value)
        if dest in given and (value is ... or was != value):
            aside.append(f"--{dest} is set aside under {name}: {why}")
    for group, what in (("critic", "critic"), ("ref", "reference model")):
        dests = sorted(dest for dest in given if dest.startswith(f"{group}.") and dest not in _OURS)
        if dests and not (needs.classifier if group == "critic" else run.taught):
            listed = ", ".join(f"--{dest}" for dest in dests)
            aside.append(f"{listed}: set aside under {name}, which has no {what}")
    if args.algo.dynamic_filtering_enable:
        notes.append(
            f"--algo.dynamic_filtering_enable: {name} trains on the prompts that are kept, so its target holds "
            "for those; the KL to the anchor is not held on the others"
        )
    if args.actor.loss_agg_mode != "token-mean":
        notes.append(
            f"--actor.loss_agg_mode {args.actor.loss_agg_mode} divides each response by its length, which shifts the "
            "target towards short ones; token-mean does not"
        )
    return notes, aside


#: Flags of ours among the host's groups.
_OURS = ("ref.update", "ref.eta", "ref.interval", "ref.model_name_or_path")


def _without_gpu(args: SimpleNamespace, given: frozenset[str], notes: list[str], aside: list[str]) -> None:
    """What a script for GPUs says of them, and what stands for it on a machine without."""
    attention = args.ds.attn_implementation
    packed = args.ds.packing_samples or args.train.dynamic_batch_enable
    stands = {
        "vllm.sync_backend": ("gloo", "no GPU"),
        "vllm.enforce_eager": (True, "no GPU"),
        "vllm.enable_sleep": (False, "no GPU whose memory could be given back"),
        "vllm.sync_with_ray": (False, "no GPU"),
        "ds.enable_sleep": (False, "no GPU whose memory could be given back"),
        "ds.adam_offload": (False, "the optimiser is on the CPU anyway"),
        "ds.attn_implementation": (
            "sdpa" if packed or "flash" in attention or "ds.attn_implementation" not in given else attention,
            "no GPU",
        ),
    }
    for dest, (value, why) in stands.items():
        was = inputs.value(args, dest)
        if was == value:
            continue
        _set(args, dest, value)
        if dest in given:
            aside.append(f"--{dest} {was} is set aside: {why}")
        else:
            notes.append(f"--{dest} is {value} ({why})")
    for group in ("ref", "critic", "reward"):
        _as_many(args, given, group, "num_gpus_per_node")  # the host's default of 8 would be 8 processes here


def _as_many(args: SimpleNamespace, given: frozenset[str], group: str, *names: str) -> None:
    """Of what the user did not say of a group's size, take the policy's."""
    for name in names:
        if f"{group}.{name}" not in given:
            setattr(getattr(args, group), name, getattr(args.actor, name))


_OUTPUTS = ("ckpt.output_dir", "ckpt.path", "logger.tensorboard_dir", "bond.reward_cache")
_MODELS = tuple(f"{group}.model_name_or_path" for group in ("actor", "reward", "critic", "ref"))
_INPUTS = (*_MODELS, "data.prompt_dataset", "eval.dataset", "train.agent_func_path")


def _absolute_paths(args: SimpleNamespace) -> None:
    """Files are meant relative to where the command was typed, not to where Ray puts a process."""
    for dest in (*_OUTPUTS, *_INPUTS):
        if name := inputs.value(args, dest):
            found = os.path.abspath(os.path.expanduser(name)) if dest in _OUTPUTS else _absolute(name)
            _set(args, dest, found)
    if args.reward.remote_url:
        args.reward.remote_url = [_absolute(url) if url.endswith(".py") else url for url in args.reward.remote_url]


def _absolute(name: str) -> str:
    """The absolute path of what exists, ``name`` (a hub's, perhaps) otherwise; of several each."""
    path, at, rest = name.partition("@")
    path = os.path.expanduser(path)
    if os.path.exists(path):
        return os.path.abspath(path) + at + rest
    return ",".join(_absolute(part.strip()) for part in name.split(",")) if "," in name else name


_NEED_A_GPU = (
    "ds.ring_attn_size",
    "ds.tensor_parallel_size",
    "vllm.tensor_parallel_size",
    "ds.load_in_4bit",
    "ds.use_liger_kernel",
)


def impediments(args: SimpleNamespace) -> list[str]:
    """What keeps this machine, which has no GPU, from running what another could."""
    asked = _given(args, _NEED_A_GPU) if on_cpu() else []
    return [f"--{dest} {inputs.value(args, dest)} needs a GPU" for dest in asked]


def problems(args: SimpleNamespace) -> list[str]:
    """Everything that keeps this run from starting, each with the flag and the fix."""
    found = [*_groups(args), *_together(args), *_host_cannot(args)]
    if args.bond.require_checkpoint and not args.ckpt.load_enable:
        found.append("--bond.require_checkpoint is about resuming: add --ckpt.load_enable")
    elif args.bond.require_checkpoint and not identity.has_checkpoint(args):
        found.append(
            f"--bond.require_checkpoint: --ckpt.path {args.ckpt.path} holds no whole checkpoint (no _actor/latest): "
            "is the path right?"
        )
    if args.ckpt.save_on_stop and args.ckpt.disable_ds:
        found.append("--ckpt.save_on_stop cannot be used with --ckpt.disable_ds, which saves no checkpoints")
    run = plan.of(args)
    loss = args.actor.policy_loss_type
    if loss not in HOST_LOSSES:
        registry.policy_loss(loss, run.algorithm)
        found += _refused(args, _OWN_LOSS, f"the policy loss {loss}")
    if run.needs.reward_cache:
        found += _refused(args, _REWARD_CACHE, "a reward cache")
    if run.algorithm is not None:
        found += _own_estimator(args, run)
    else:
        found += _step(args, args.train.batch_size)
    if run.transform is not None:
        found += _transform(args, run.transform)
    if args.ref.update != "none":
        found += _moving_reference(args, run)
    return found + _other_reference(args, run)


def _host_cannot(args: SimpleNamespace) -> list[str]:
    """What ends in the middle of a run whatever the estimator, in OpenRLHF 0.11.2 with DeepSpeed 0.19."""
    ds, muon = args.ds, args.actor.optim == "muon"
    lines = {
        "--ds.lora.rank cannot run: the host sends the engines adapters under names that vLLM does not know: train "
        "without": ds.lora.rank > 0,
        "--actor.optim muon with --ds.zero_stage 3 cannot run: DeepSpeed refuses it: use stage 1 or 2": muon
        and ds.zero_stage == 3,
        "--actor.optim muon with --ds.adam_offload cannot run: DeepSpeed refuses it: drop the offload": muon
        and ds.adam_offload,
        "--ds.tensor_parallel_size with --ds.zero_stage 3 cannot run: transformers refuses it: use stage 2": (
            ds.tensor_parallel_size > 1 and ds.zero_stage == 3
        ),
    }
    return [line for line, on in lines.items() if on]


def _groups(args: SimpleNamespace) -> list[str]:
    """Groups whose workers would get unequal numbers of micro-batches: under ZeRO-3 a forward pass waits for all."""
    if args.ds.zero_stage != 3:
        return []
    samples = args.rollout.batch_size * plan.of(args).rows.all
    found = []
    for group in loaded(args):
        ranks = _ranks(args, group)
        if args.train.dynamic_batch_enable:
            unequal = _ranks(args) % ranks
        else:
            unequal = -(-samples // args.rollout.micro_batch_size) % ranks
        if unequal:
            found.append(
                f"--{group}.num_gpus_per_node: {samples} responses in micro-batches of --rollout.micro_batch_size "
                f"{args.rollout.micro_batch_size} cannot be dealt evenly to {ranks} data-parallel ranks, and under "
                "--ds.zero_stage 3 the run would hang: change one of them, or use --ds.zero_stage 2"
            )
    return found


def _together(args: SimpleNamespace) -> list[str]:
    """Groups that share GPUs and must be of one size."""
    train, found = args.train, []
    actors, copies = args.actor.num_nodes * args.actor.num_gpus_per_node, _copies(args)
    if actors % copies:
        found.append(
            f"--actor.num_nodes x --actor.num_gpus_per_node = {actors} must be a multiple of --ds.ring_attn_size x "
            f"--ds.tensor_parallel_size = {copies}"
        )

    def alike(flag: str, one: str, other: str) -> None:
        sizes = [(getattr(args, group).num_nodes, getattr(args, group).num_gpus_per_node) for group in (one, other)]
        if sizes[0] != sizes[1]:
            found.append(
                f"{flag}: --{one}.num_nodes and --{one}.num_gpus_per_node must be those of --{other}.*, got "
                f"{sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]}"
            )

    if args.algo.kl.init_coef > 0 and (train.colocate_actor_ref or train.colocate_all):
        alike("--train.colocate_all" if train.colocate_all else "--train.colocate_actor_ref", "ref", "actor")
    if train.colocate_critic_reward and args.critic.model_name_or_path and not args.reward.remote_url:
        alike("--train.colocate_critic_reward", "critic", "reward")
    engines = args.vllm.num_engines
    if train.colocate_all and not train.async_enable and actors != engines * args.vllm.tensor_parallel_size:
        found.append(
            f"--train.colocate_all: --vllm.num_engines x --vllm.tensor_parallel_size must be as many as the "
            f"{actors} GPUs of --actor.*, got {engines} x {args.vllm.tensor_parallel_size}"
        )
    return found


def _moving_reference(args: SimpleNamespace, run: plan.Run) -> list[str]:
    """``--ref.update`` where it has no meaning, or cannot be kept."""
    found = []
    if run.algorithm is not None:
        found.append(f"--ref.update is for the host's own estimators; {args.algo.advantage.estimator} has --bond.eta")
    if run.transform is not None:
        found.append(f"--ref.update cannot be used with {flags.TRANSFORM}: its KL is to the initial policy")
    if args.algo.kl.init_coef <= 0:
        found.append("--ref.update needs --algo.kl.init_coef above 0: without, there is no KL to a reference")
    return found + _refused(args, _NOT_KEPT, "--ref.update")


def _other_reference(args: SimpleNamespace, run: plan.Run) -> list[str]:
    """``--ref.model_name_or_path`` where nobody asks for another model, or none is given where one is needed."""
    other, name = args.ref.model_name_or_path, args.algo.advantage.estimator
    if run.taught and not other:
        return [f"{name} learns from a teacher: give --ref.model_name_or_path, a model with the policy's vocabulary"]
    if run.needs.logits:
        made = "computed where logits are made a piece at a time"
        for flag, on in {
            "--bond.logits_mb 0": not args.bond.logits_mb,
            f"--ds.ring_attn_size {args.ds.ring_attn_size}": args.ds.ring_attn_size > 1,
            "--data.max_images_per_prompt": args.data.max_images_per_prompt > 0,
        }.items():
            if on:
                return [f"{flag} cannot be used with {name}: its loss is on logits, {made}"]
    if not other or run.taught:
        return []
    why = {
        f"{name}'s KL is to weights of the policy's own": run.algorithm is not None,
        f"the KL of {args.reward.transform} is to the initial policy": run.transform is not None,
        "--ref.update makes a reference of the policy": args.ref.update != "none",
        "without --algo.kl.init_coef above 0 there is no KL": args.algo.kl.init_coef <= 0,
    }
    return [f"--ref.model_name_or_path has no use here: {reason}" for reason, on in why.items() if on][:1]


def _transform(args: SimpleNamespace, transform: RewardTransform) -> list[str]:
    """Settings under which the host's training would not have the transform's optimum."""
    name, coefficient, needs = args.reward.transform, transform.kl_coefficient, transform.needs()
    found = []
    if needs.weights - {"reference"} or needs.source_samples or needs.classifier:
        found.append(f"{flags.TRANSFORM} {name} asks for more than a transform can have: see RewardTransform.needs")
    if "reference" in needs.log_probs and args.algo.kl.init_coef <= 0:
        found.append(f"{flags.TRANSFORM} {name} needs --algo.kl.init_coef above 0: without, there is no reference")
    if coefficient is not None and abs(args.algo.kl.init_coef - coefficient) > 1e-6 * coefficient:
        found.append(
            f"--algo.kl.init_coef {args.algo.kl.init_coef} contradicts {flags.TRANSFORM} {name}, whose KL "
            f"coefficient is {coefficient:.6g}: drop the flag, or change the strength of the target"
        )
    refused = {
        **(_LOG_RATIOS if "reference" in needs.log_probs else {}),
        **(_OPTIMUM if coefficient is not None else {}),
    }
    return found + _refused(args, refused, f"{flags.TRANSFORM} {name}")


def _own_estimator(args: SimpleNamespace, run: plan.Run) -> list[str]:
    name, needs = args.algo.advantage.estimator, run.needs
    found = _refused(args, _OWN_ESTIMATOR, name)
    loss = args.actor.policy_loss_type
    if run.algorithm.policy_loss == registry.OWN_LOSS != loss:
        found.append(f"--actor.policy_loss_type {loss}: {name} is a loss of its own: drop the flag")
    n = args.rollout.n_samples_per_prompt
    if n < needs.least:
        found.append(
            f"--rollout.n_samples_per_prompt {n}: {name} compares a prompt's samples with one another and needs "
            f"at least {needs.least}; 8 is a good number"
        )
    if needs.source_samples or needs.offline:
        found += _drawing(args, needs)
    if needs.classifier:
        ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
        if args.critic.num_nodes * args.critic.num_gpus_per_node != ranks:
            found.append(
                f"--critic.num_gpus_per_node: the classifier needs as many ranks as the policy ({ranks}); drop it"
            )
        if args.train.colocate_critic_reward:
            found.append("--train.colocate_critic_reward cannot be used with a learned quantile yet")
    baseline = getattr(run.algorithm.config, "baseline", None)
    if baseline == "leave_one_out" and n < 2:
        found.append("--bond.baseline leave_one_out needs --rollout.n_samples_per_prompt 2 or more; or use batch")
    if baseline == "batch" and args.rollout.batch_size * n < 2:
        found.append("--bond.baseline batch needs at least two samples a rollout; use --bond.baseline none")
    return found + _sizes(args, needs.selected_samples)


def _drawing(args: SimpleNamespace, needs: Needs) -> list[str]:
    """Modes of the host in which samples of other weights cannot be drawn beside the policy's, or trained on."""
    name = args.algo.advantage.estimator
    drawn = f"samples of the {needs.source} (--bond.n_anchor_samples)"
    if needs.source == "stored" or needs.offline:
        drawn = "stored responses"
    under, after = f"{name} and {drawn}", ". Without such samples it can"
    found = _refused(args, _DRAWING, under, after)
    if args.rollout.vllm_generate_batch_size != args.rollout.batch_size:
        why = "it must equal --rollout.batch_size: a step uses all its samples"
        found.append(f"--rollout.vllm_generate_batch_size cannot be used with {under}: {why}{after}")
    if needs.selected_samples and args.actor.policy_loss_type in HOST_LOSSES:
        found.append(
            f"--actor.policy_loss_type {args.actor.policy_loss_type}: {name} trains on source samples too, so it "
            "needs a policy loss of its own, such as jbond: drop the flag"
        )
    return found


def _ranks(args: SimpleNamespace, group: str = "actor") -> int:
    """Data-parallel ranks of a group."""
    node = getattr(args, group)
    return max(1, node.num_nodes * node.num_gpus_per_node // _copies(args))


def _copies(args: SimpleNamespace) -> int:
    """Ranks that share one sample."""
    return args.ds.ring_attn_size * args.ds.tensor_parallel_size


def _dealt(args: SimpleNamespace, rows: int, group: str, what: str) -> list[str]:
    """Rows that are not a whole number of micro-batches on each rank of the policy."""
    micro, ranks = 1 if args.train.dynamic_batch_enable else getattr(args, group).micro_batch_size, _ranks(args)
    if rows % (ranks * micro) == 0:
        return []
    return [f"{what} must be a multiple of --{group}.micro_batch_size {micro} x {ranks} data-parallel ranks"]


def _step(args: SimpleNamespace, rows: int, beside: str = "") -> list[str]:
    return _dealt(args, rows, "train", f"an optimiser step trains on {rows} responses{beside}, which")


def _sizes(args: SimpleNamespace, selected: int) -> list[str]:
    """Batches that do not come out even, which the host would meet in the middle of a step."""
    n, batch = args.rollout.n_samples_per_prompt, args.train.batch_size
    samples = args.rollout.batch_size * n
    found = []
    if batch % n and args.actor.policy_loss_type not in HOST_LOSSES:
        return [
            f"--train.batch_size {batch} must be a multiple of --rollout.n_samples_per_prompt {n}: it counts "
            "samples of the policy, and an optimiser step takes whole prompts"
        ]
    if samples % batch:
        found.append(
            f"--rollout.batch_size {args.rollout.batch_size} x --rollout.n_samples_per_prompt {n} = {samples} "
            f"samples must be a multiple of --train.batch_size {batch}"
        )
    rows = batch // n * (n + selected) if selected else batch
    beside = f" ({batch} samples of the policy and {rows - batch} source samples)" if selected else ""
    found += _step(args, rows, beside)
    forward = args.rollout.batch_size * (n + selected)
    return found + _dealt(args, forward, "rollout", f"a rollout of {forward} responses")

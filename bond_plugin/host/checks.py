"""What is refused before Ray starts: a run that would silently be another algorithm, or fail much later."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
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
_PIECES = "its loss is on logits, computed where logits are made a piece at a time"
_ON_LOGITS = {"ds.ring_attn_size": _PIECES, "data.max_images_per_prompt": _PIECES}
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

    That changes the arguments. ``given`` and ``critic`` are as in :class:`~bond_plugin.host.flags.Invocation`.

    Returns:
        Notes to print; and of flags that were given and are set aside, a line each.
    """
    notes: list[str] = []
    aside: list[str] = []

    def settle(dest: str, value: object, why: str) -> None:
        was = inputs.value(args, dest)
        if was != value:
            _set(args, dest, value)
            listed, line = (aside, f"{was} is set aside: {why}") if dest in given else (notes, f"is {value} ({why})")
            listed.append(f"--{dest} {line}")

    def default(dest: str, value: object, why: str) -> None:
        if dest not in given:
            settle(dest, value, why)

    if on_cpu():
        for dest, settled in _without_gpu(args, given).items():
            settle(dest, *settled)
    _absolute_paths(args)
    if args.ckpt.load_enable and not args.bond.require_checkpoint and not identity.has_checkpoint(args):
        notes.append(f"--ckpt.load_enable: {args.ckpt.path} holds no whole checkpoint, so the run starts at step 0")
    if not args.eval.dataset and args.eval.steps > 0:
        notes.append(f"--eval.steps {args.eval.steps} evaluates nothing without --eval.dataset")
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


def _without_gpu(args: SimpleNamespace, given: frozenset[str]) -> dict[str, tuple[object, str]]:
    """What stands for what a script says of GPUs on a machine without, and why."""
    attention = args.ds.attn_implementation
    packed = args.ds.packing_samples or args.train.dynamic_batch_enable
    for group in ("ref", "critic", "reward"):
        _as_many(args, given, group, "num_gpus_per_node")  # the host's default of 8 would be 8 processes here
    return {
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


def _as_many(args: SimpleNamespace, given: frozenset[str], group: str, *names: str) -> None:
    """Of what the user did not say of a group's size, take the policy's."""
    for name in names:
        if f"{group}.{name}" not in given:
            setattr(getattr(args, group), name, getattr(args.actor, name))


#: Flags that name files or folders; and those that name one, or something on a hub.
_PATHS = ("ckpt.output_dir", "ckpt.path", "logger.tensorboard_dir", "bond.reward_cache")
_NAMES = (
    *(f"{group}.model_name_or_path" for group in ("actor", "reward", "critic", "ref")),
    "data.prompt_dataset",
    "eval.dataset",
    "train.agent_func_path",
)


def _absolute_paths(args: SimpleNamespace) -> None:
    """Files are meant relative to where the command was typed, not to where Ray puts a process."""
    for dest in (*_PATHS, *_NAMES):
        if name := inputs.value(args, dest):
            found = os.path.abspath(os.path.expanduser(name)) if dest in _PATHS else _absolute(name)
            _set(args, dest, found)
    if args.reward.remote_url:
        args.reward.remote_url = [_absolute(url) if url.endswith(".py") else url for url in args.reward.remote_url]


def _absolute(name: str) -> str:
    """The absolute path of what exists, ``name`` (a hub's, perhaps) otherwise; of several each."""
    if "," in name and not os.path.exists(os.path.expanduser(name)):
        return ",".join(_absolute(part.strip()) for part in name.split(","))
    path, at, rest = name.partition("@")
    path = os.path.expanduser(path)
    return os.path.abspath(path) + at + rest if os.path.exists(path) else name


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


def problems(args: SimpleNamespace) -> Iterator[str]:
    """Everything that keeps this run from starting, each with the flag and the fix."""
    yield from _groups(args)
    yield from _together(args)
    yield from _host_cannot(args)
    if args.bond.require_checkpoint and not args.ckpt.load_enable:
        yield "--bond.require_checkpoint is about resuming: add --ckpt.load_enable"
    elif args.bond.require_checkpoint and not identity.has_checkpoint(args):
        yield (
            f"--bond.require_checkpoint: --ckpt.path {args.ckpt.path} holds no whole checkpoint (no _actor/latest): "
            "is the path right?"
        )
    if args.ckpt.save_on_stop and args.ckpt.disable_ds:
        yield "--ckpt.save_on_stop cannot be used with --ckpt.disable_ds, which saves no checkpoints"
    if args.ckpt.disable_ds and args.ckpt.save_steps > 0 and not args.ckpt.save_hf:
        yield "--ckpt.save_steps saves nothing with --ckpt.disable_ds: drop one of them, or add --ckpt.save_hf"
    run = plan.of(args)
    yield from _idle(args, run)
    loss = args.actor.policy_loss_type
    if loss not in HOST_LOSSES:
        registry.policy_loss(loss, run.algorithm)
        yield from _refused(args, _OWN_LOSS, f"the policy loss {loss}")
    if run.needs.reward_cache:
        yield from _refused(args, _REWARD_CACHE, "a reward cache")
    if run.algorithm is not None:
        yield from _own_estimator(args, run)
    else:
        yield from _step(args, args.train.batch_size)
    if run.transform is not None:
        yield from _transform(args, run.transform)
    if args.ref.update != "none":
        yield from _moving_reference(args, run)
    if run.needs.logits:
        yield from _refused(args, _ON_LOGITS, args.algo.advantage.estimator)
        if not plan.in_bytes(args, "logits_mb"):
            mib, name = args.bond.logits_mb, args.algo.advantage.estimator
            yield f"--bond.logits_mb {mib:g} cannot be used with {name}: {_PIECES}"
    yield from _other_reference(args, run)


def _idle(args: SimpleNamespace, run: plan.Run) -> Iterator[str]:
    """Flags of ours that would change nothing, which whoever gives them does not expect."""
    for dest, used, why in (
        ("bond.save_anchor", run.needs.anchor, "this run keeps no anchor"),
        ("bond.cache_samples", run.needs.reward_cache, f"this run reads no {flags.REWARD_CACHE}"),
        ("bond.reward_cache_mismatch", run.needs.reward_cache, f"this run reads no {flags.REWARD_CACHE}"),
        ("ref.eta", args.ref.update == "ema", "it is of --ref.update ema"),
        ("ref.interval", args.ref.update == "periodic", "it is of --ref.update periodic"),
    ):
        if not used and inputs.value(args, dest) != flags.RUN_FLAGS[f"--{dest}"]["default"]:
            yield f"--{dest} has no effect here: {why}. Drop it"


def _host_cannot(args: SimpleNamespace) -> Iterator[str]:
    """What ends in the middle of a run whatever the estimator, in OpenRLHF 0.11.2 with DeepSpeed 0.19."""
    ds, muon = args.ds, args.actor.optim == "muon"
    if ds.lora.rank > 0:
        yield (
            "--ds.lora.rank cannot run: the host sends the engines adapters under names that vLLM does not know: "
            "train without"
        )
    if muon and ds.zero_stage == 3:
        yield "--actor.optim muon with --ds.zero_stage 3 cannot run: DeepSpeed refuses it: use stage 1 or 2"
    if muon and ds.adam_offload:
        yield "--actor.optim muon with --ds.adam_offload cannot run: DeepSpeed refuses it: drop the offload"
    if ds.tensor_parallel_size > 1 and ds.zero_stage == 3:
        yield "--ds.tensor_parallel_size with --ds.zero_stage 3 cannot run: transformers refuses it: use stage 2"


def _groups(args: SimpleNamespace) -> Iterator[str]:
    """Groups whose workers would get unequal numbers of micro-batches: under ZeRO-3 a forward pass waits for all."""
    samples = args.rollout.batch_size * plan.of(args).rows.all
    dealt = -(-samples // args.rollout.micro_batch_size)
    if args.train.dynamic_batch_enable:
        dealt = _ranks(args)
    for group in loaded(args) if args.ds.zero_stage == 3 else ():
        ranks = _ranks(args, group)
        if dealt % ranks:
            yield (
                f"--{group}.num_gpus_per_node: {samples} responses in micro-batches of --rollout.micro_batch_size "
                f"{args.rollout.micro_batch_size} cannot be dealt evenly to {ranks} data-parallel ranks, and under "
                "--ds.zero_stage 3 the run would hang: change one of them, or use --ds.zero_stage 2"
            )


def _together(args: SimpleNamespace) -> Iterator[str]:
    """Groups that share GPUs and must be of one size."""
    train, engines = args.train, args.vllm.num_engines
    actors, copies = args.actor.num_nodes * args.actor.num_gpus_per_node, _copies(args)
    if actors % copies:
        yield (
            f"--actor.num_nodes x --actor.num_gpus_per_node = {actors} must be a multiple of --ds.ring_attn_size x "
            f"--ds.tensor_parallel_size = {copies}"
        )
    alike = []
    if args.algo.kl.init_coef > 0 and (train.colocate_actor_ref or train.colocate_all):
        alike.append(("--train.colocate_all" if train.colocate_all else "--train.colocate_actor_ref", "ref", "actor"))
    if train.colocate_critic_reward and args.critic.model_name_or_path and not args.reward.remote_url:
        alike.append(("--train.colocate_critic_reward", "critic", "reward"))
    for flag, one, other in alike:
        sizes = [(getattr(args, group).num_nodes, getattr(args, group).num_gpus_per_node) for group in (one, other)]
        if sizes[0] != sizes[1]:
            yield (
                f"{flag}: --{one}.num_nodes and --{one}.num_gpus_per_node must be those of --{other}.*, got "
                f"{sizes[0][0]} x {sizes[0][1]} and {sizes[1][0]} x {sizes[1][1]}"
            )
    if train.colocate_all and not train.async_enable and actors != engines * args.vllm.tensor_parallel_size:
        yield (
            f"--train.colocate_all: --vllm.num_engines x --vllm.tensor_parallel_size must be as many as the "
            f"{actors} GPUs of --actor.*, got {engines} x {args.vllm.tensor_parallel_size}"
        )


def _moving_reference(args: SimpleNamespace, run: plan.Run) -> Iterator[str]:
    """``--ref.update`` where it has no meaning, or cannot be kept."""
    if run.algorithm is not None:
        yield f"--ref.update is for the host's own estimators; {args.algo.advantage.estimator} has --bond.eta"
    if run.transform is not None:
        yield f"--ref.update cannot be used with {flags.TRANSFORM}: its KL is to the initial policy"
    if args.algo.kl.init_coef <= 0:
        yield "--ref.update needs --algo.kl.init_coef above 0: without, there is no KL to a reference"
    yield from _refused(args, _NOT_KEPT, "--ref.update")


def _other_reference(args: SimpleNamespace, run: plan.Run) -> Iterator[str]:
    """``--ref.model_name_or_path`` where nobody asks for another model, or none is given where one is needed."""
    other, name, unused = args.ref.model_name_or_path, args.algo.advantage.estimator, None
    if run.taught:
        if not other:
            yield f"{name} learns from a teacher: give --ref.model_name_or_path, a model with the policy's vocabulary"
        return
    if run.algorithm is not None:
        unused = f"{name}'s KL is to weights of the policy's own"
    elif run.transform is not None:
        unused = f"the KL of {args.reward.transform} is to the initial policy"
    elif args.ref.update != "none":
        unused = "--ref.update makes a reference of the policy"
    elif args.algo.kl.init_coef <= 0:
        unused = "without --algo.kl.init_coef above 0 there is no KL"
    if other and unused:
        yield f"--ref.model_name_or_path has no use here: {unused}"


def _transform(args: SimpleNamespace, transform: RewardTransform) -> Iterator[str]:
    """Settings under which the host's training would not have the transform's optimum."""
    name, coefficient, needs = (
        f"{flags.TRANSFORM} {args.reward.transform}",
        transform.kl_coefficient,
        transform.needs(),
    )
    if needs.weights - {"reference"} or needs.source_samples or needs.classifier:
        yield f"{name} asks for more than a transform can have: see RewardTransform.needs"
    if "reference" in needs.log_probs:
        if args.algo.kl.init_coef <= 0:
            yield f"{name} needs --algo.kl.init_coef above 0: without, there is no reference"
        yield from _refused(args, _LOG_RATIOS, name)
    if coefficient is not None:
        if abs(args.algo.kl.init_coef - coefficient) > 1e-6 * coefficient:
            yield (
                f"--algo.kl.init_coef {args.algo.kl.init_coef} contradicts {name}, whose KL coefficient is "
                f"{coefficient:.6g}: drop the flag, or change the strength of the target"
            )
        yield from _refused(args, _OPTIMUM, name)


def _own_estimator(args: SimpleNamespace, run: plan.Run) -> Iterator[str]:
    name, needs, loss = args.algo.advantage.estimator, run.needs, args.actor.policy_loss_type
    yield from _refused(args, _OWN_ESTIMATOR, name)
    if run.algorithm.policy_loss == registry.OWN_LOSS != loss:
        yield f"--actor.policy_loss_type {loss}: {name} is a loss of its own: drop the flag"
    n = args.rollout.n_samples_per_prompt
    if n < needs.least:
        yield (
            f"--rollout.n_samples_per_prompt {n}: {name} compares a prompt's samples with one another and needs "
            f"at least {needs.least}; 8 is a good number"
        )
    if needs.source_samples or needs.offline:
        yield from _drawing(args, needs)
    if needs.classifier:
        ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
        if args.critic.num_nodes * args.critic.num_gpus_per_node != ranks:
            yield f"--critic.num_gpus_per_node: the classifier needs as many ranks as the policy ({ranks}); drop it"
        if args.train.colocate_critic_reward:
            yield "--train.colocate_critic_reward cannot be used with a learned quantile yet"
    baseline = getattr(run.algorithm.config, "baseline", None)
    if baseline == "leave_one_out" and n < 2:
        yield "--bond.baseline leave_one_out needs --rollout.n_samples_per_prompt 2 or more; or use batch"
    if baseline == "batch" and args.rollout.batch_size * n < 2:
        yield "--bond.baseline batch needs at least two samples a rollout; use --bond.baseline none"
    yield from _sizes(args, needs.selected_samples)


def _drawing(args: SimpleNamespace, needs: Needs) -> Iterator[str]:
    """Modes of the host in which samples of other weights cannot be drawn beside the policy's, or trained on."""
    name, drawn = args.algo.advantage.estimator, f"samples of the {needs.source} (--bond.n_anchor_samples)"
    if needs.source == "stored" or needs.offline:
        drawn = "stored responses"
    under, after = f"{name} and {drawn}", ". Without such samples it can"
    yield from _refused(args, _DRAWING, under, after)
    if args.rollout.vllm_generate_batch_size != args.rollout.batch_size:
        why = "it must equal --rollout.batch_size: a step uses all its samples"
        yield f"--rollout.vllm_generate_batch_size cannot be used with {under}: {why}{after}"
    if needs.selected_samples and args.actor.policy_loss_type in HOST_LOSSES:
        yield (
            f"--actor.policy_loss_type {args.actor.policy_loss_type}: {name} trains on source samples too, so it "
            "needs a policy loss of its own, such as jbond: drop the flag"
        )


def _ranks(args: SimpleNamespace, group: str = "actor") -> int:
    """Data-parallel ranks of a group."""
    node = getattr(args, group)
    return max(1, node.num_nodes * node.num_gpus_per_node // _copies(args))


def _copies(args: SimpleNamespace) -> int:
    """Ranks that share one sample."""
    return args.ds.ring_attn_size * args.ds.tensor_parallel_size


def _dealt(args: SimpleNamespace, rows: int, group: str, what: str) -> Iterator[str]:
    """Rows that are not a whole number of micro-batches on each rank of the policy."""
    micro, ranks = 1 if args.train.dynamic_batch_enable else getattr(args, group).micro_batch_size, _ranks(args)
    if rows % (ranks * micro):
        yield f"{what} must be a multiple of --{group}.micro_batch_size {micro} x {ranks} data-parallel ranks"


def _step(args: SimpleNamespace, rows: int, beside: str = "") -> Iterator[str]:
    return _dealt(args, rows, "train", f"an optimiser step trains on {rows} responses{beside}, which")


def _sizes(args: SimpleNamespace, selected: int) -> Iterator[str]:
    """Batches that do not come out even, which the host would meet in the middle of a step."""
    n, batch = args.rollout.n_samples_per_prompt, args.train.batch_size
    samples, forward = args.rollout.batch_size * n, args.rollout.batch_size * (n + selected)
    if batch % n and args.actor.policy_loss_type not in HOST_LOSSES:
        yield (
            f"--train.batch_size {batch} must be a multiple of --rollout.n_samples_per_prompt {n}: it counts "
            "samples of the policy, and an optimiser step takes whole prompts"
        )
        return
    if samples % batch:
        yield (
            f"--rollout.batch_size {args.rollout.batch_size} x --rollout.n_samples_per_prompt {n} = {samples} "
            f"samples must be a multiple of --train.batch_size {batch}"
        )
    rows = batch // n * (n + selected) if selected else batch
    beside = f" ({batch} samples of the policy and {rows - batch} source samples)" if selected else ""
    yield from _step(args, rows, beside)
    yield from _dealt(args, forward, "rollout", f"a rollout of {forward} responses")

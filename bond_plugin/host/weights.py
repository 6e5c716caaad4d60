"""The anchor and the reference: other weights for the policy's model, sharded like its optimiser.

DeepSpeed keeps fp32 master weights, of which each data-parallel rank holds one part, and 16-bit parameters
made from them. The anchor is an fp32 moving average of those masters, part by part: one copy in a
data-parallel group, the same under ZeRO-2 and ZeRO-3, updated without communication. (An average kept in
bf16, like the host's own, hardly moves at the learning rates of RLHF: its increments are below bf16's
resolution.) The reference is the initial policy in 16 bits, sharded the same way.

To sample from the anchor or to compute its log-probabilities, its weights are put in place of the policy's
16-bit parameters and taken out again: :meth:`Weights.swapped_in`. So everything the host does with the
policy (a forward pass, sending weights to the engines, saving a model) works for the anchor as it is, with
no second model in memory. Afterwards the parameters are made from the masters again, exactly as DeepSpeed
makes them after an optimiser step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from bond_plugin.host import plan

#: Weights that are compared at a time: what :meth:`Weights.anchor_distance` needs, and sums in fp32 without loss.
_PIECE = 2**20

#: Of a part, consecutive numbers that are one parameter's: (its name, where they begin in the part, where in the
#: flattened parameter, how many).
Piece = tuple[str, int, int, int]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or does not hold what this run needs."""


class Weights:
    """The sets of weights that live beside a DeepSpeed engine's own.

    Args:
        engine: a DeepSpeed engine under ZeRO-1, 2 or 3. Its fp32 masters may be on the CPU; the kept weights are
            where they are.
        eta: step of the anchor's moving average, or ``None``.
        keep_reference: whether to keep the weights as they are now.
        interval: instead of an average, the anchor is a copy of the policy, renewed every so many optimiser
            steps. ``None`` with ``eta`` ``None``: no anchor.
    """

    def __init__(self, engine: Any, eta: float | None, keep_reference: bool, interval: int | None = None) -> None:
        self._engine = engine
        zero3 = hasattr(engine.optimizer, "fp16_partitioned_groups_flat")
        self._sharded = _Zero3(engine.optimizer) if zero3 else _Zero12(engine.optimizer)
        self.eta = eta
        self.interval = interval
        self.active = "policy"
        self._steps_seen = engine.global_steps
        self._sets: dict[str, list[torch.Tensor]] = {}
        if eta is not None or interval is not None:
            self._sets["anchor"] = [master.detach().clone() for master in self._sharded.masters()]
        if keep_reference:
            # Of what is trained: beside adapters the other parameters may be of another type.
            dtype = next(p for p in engine.module.parameters() if p.requires_grad).dtype
            self._sets["reference"] = [master.detach().to(dtype, copy=True) for master in self._sharded.masters()]

    def __contains__(self, name: str) -> bool:
        return name in self._sets

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Move the anchor if the engine has taken an optimiser step since the last call (Algorithms 1 and 2)."""
        if self._engine.global_steps == self._steps_seen:
            return
        self._steps_seen = self._engine.global_steps
        if self.interval is not None and self._steps_seen % self.interval == 0:
            for copy, master in zip(self._sets["anchor"], self._sharded.masters(), strict=True):
                copy.copy_(master.detach())
        elif self.eta is not None and self._engine.was_step_applied():
            for average, master in zip(self._sets["anchor"], self._sharded.masters(), strict=True):
                average.lerp_(master.detach(), self.eta)

    @contextmanager
    def swapped_in(self, name: str) -> Iterator[None]:
        """Within the context the engine's parameters are those of ``name``. Collective: all ranks enter it.

        Raises:
            KeyError: no such weights are kept.
            RuntimeError: other weights are in place already.
        """
        if name == "policy":
            yield
            return
        if self.active != "policy":
            raise RuntimeError(f"{self.active} is in place, cannot put {name} there")
        self._sharded.load(self._sets[name])
        self.active = name
        try:
            yield
        finally:
            self._sharded.load(self._sharded.masters())
            self.active = "policy"

    @torch.no_grad()
    def anchor_distance(self) -> float:
        """The L2 norm of policy minus anchor over all parameters, from the fp32 weights. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        # Under tensor parallelism some parameters (norms, say) are whole on each rank: they count once.
        _, ranks = self._tensor_parallel()
        whole = self._sharded.replicated() if ranks > 1 else ()
        parts = zip(self._sets["anchor"], self._sharded.masters(), self._sharded.pieces(), strict=True)
        for average, master, held in parts:
            for name, place, _, length in held:
                pair = (one.detach().narrow(0, place, length).split(_PIECE) for one in (average, master))
                for kept, now in zip(*pair, strict=True):
                    difference = now - kept
                    square = torch.dot(difference, difference).to(total.device)
                    total.add_(square, alpha=1.0 / ranks if name in whole else 1.0)
        dist.all_reduce(total)
        return total.sqrt().item()

    @torch.no_grad()
    def follow_masters(self) -> None:
        """Keep each part on the device where its masters are: sleeping states are on the CPU, in pinned memory."""
        for parts in self._sets.values():
            for i, master in enumerate(self._sharded.masters()):
                if parts[i].device != master.device:
                    moved = torch.empty_like(parts[i], device=master.device, pin_memory=master.device.type == "cpu")
                    parts[i] = moved.copy_(parts[i])

    def anchor_state(self) -> dict[str, Any]:
        """This rank's part of the anchor, for a checkpoint, with what says where each of its numbers belongs."""
        return {
            "anchor": [part.cpu() for part in self._sets["anchor"]],
            "pieces": self._sharded.pieces(),
            "ranks": dist.get_world_size(),
            "zero_stage": self._engine.zero_optimization_stage(),
            "tensor_parallel": self._tensor_parallel(),
        }

    def _tensor_parallel(self) -> tuple[int, int]:
        """(rank, size) of this rank's tensor-parallel group."""
        size = self._engine.autotp_size()
        return (self._engine.mpu.get_tensor_model_parallel_rank(), size) if size > 1 else (0, 1)

    @torch.no_grad()
    def load_anchor(self, states: list[dict[str, Any]], folder: str) -> None:
        """Take the anchor from what all ranks of a run wrote, however many they were and at which ZeRO stage.

        Args:
            states: of :meth:`anchor_state`, by rank. What is not this rank's is not read if they are mapped files.
            folder: where they are, for errors.

        Raises:
            CheckpointError: it is of another model, or was written under another tensor parallelism.
        """
        mine, here = self._tensor_parallel(), self._sharded.pieces()
        if "pieces" not in states[0]:
            states = [{**self._as_written(states, folder), "pieces": here, "tensor_parallel": mine}]
        states = [state for state in states if tuple(state["tensor_parallel"]) == mine]
        if not states:
            raise CheckpointError(f"the anchor in {folder} was written with another --ds.tensor_parallel_size")
        there: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for state in states:
            for part, held in zip(state["anchor"], state["pieces"], strict=True):
                for name, place, start, length in held:
                    there.setdefault(name, []).append((start, part.narrow(0, place, length)))
        for part, held in zip(self._sets["anchor"], here, strict=True):
            for name, place, start, length in held:
                into, missing = part.narrow(0, place, length), length
                for begin, values in there.get(name, ()):
                    first, last = max(start, begin), min(start + length, begin + len(values))
                    if first < last:
                        into[first - start : last - start].copy_(values[first - begin : last - begin])
                        missing -= last - first
                if missing:
                    raise CheckpointError(
                        f"the anchor in {folder} lacks {missing} of {length} weights of {name}: it is another model's"
                    )
        self._steps_seen = self._engine.global_steps

    def _as_written(self, states: list[dict[str, Any]], folder: str) -> dict[str, Any]:
        """This rank's part, if it was written before parts said where they belong: by the same ranks and stage."""
        here = (dist.get_world_size(), self._engine.zero_optimization_stage())
        there = (states[0]["ranks"], states[0]["zero_stage"])
        own = states[min(dist.get_rank(), len(states) - 1)]
        if here != there or [p.shape for p in own["anchor"]] != [p.shape for p in self._sets["anchor"]]:
            raise CheckpointError(
                f"the anchor in {folder} was written by openrlhf-bond 0.1 with {there[0]} ranks at ZeRO stage "
                f"{there[1]}, and only they can read it; this run has {here[0]} at {here[1]}. Resume with the same "
                "model, --actor.num_gpus_per_node and --ds.zero_stage; checkpoints from then on are free of this"
            )
        return own


class _Zero12:
    """ZeRO-1 and 2: every rank holds all 16-bit parameters in flat buffers, and its part of the masters."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def masters(self) -> list[torch.Tensor]:
        return list(self._optimizer.single_partition_of_fp32_groups)

    def pieces(self) -> list[list[Piece]]:
        return [list(self._in_group(params)) for params in self._optimizer.bit16_groups]

    def _in_group(self, params: list[Any]) -> Iterator[Piece]:
        for param in params:
            mapping = getattr(param, "_hp_mapping", None)
            if mapping is not None:  # else another data-parallel rank has it
                of, at = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield self._optimizer.param_names[param], at.start, of.start, of.numel

    def replicated(self) -> set[str]:
        """The parameters of which each rank of a tensor-parallel group has the same."""
        from deepspeed.runtime.utils import is_model_parallel_parameter

        return {name for param, name in self._optimizer.param_names.items() if not is_model_parallel_parameter(param)}

    @torch.no_grad()
    def load(self, parts: list[torch.Tensor]) -> None:
        optimizer = self._optimizer
        masters = optimizer.single_partition_of_fp32_groups
        optimizer.single_partition_of_fp32_groups = parts
        try:
            optimizer.update_lp_params()  # as it does after a step
        finally:
            optimizer.single_partition_of_fp32_groups = masters


class _Zero3:
    """ZeRO-3: 16-bit parameters are sharded too; small ones are also kept whole and must be made anew."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def masters(self) -> list[torch.Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def pieces(self) -> list[list[Piece]]:
        return [list(self._in_group(params)) for params in self._optimizer.fp16_groups]

    def _in_group(self, params: list[Any]) -> Iterator[Piece]:
        place = 0  # in the part, where each parameter's share has the same length on every rank
        for param in params:
            share = param.partition_numel()
            start = share * dist.get_rank(group=param.ds_process_group)
            if start < param.ds_numel:
                yield self._optimizer.param_names[param], place, start, min(share, param.ds_numel - start)
            place += share

    @torch.no_grad()
    def load(self, parts: list[torch.Tensor]) -> None:
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()  # every parameter back to its shards
        for group, part in enumerate(parts):
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(part.data)
            optimizer._unflatten_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # the small ones gathered again


# What is attached to the host's strategy.


def engine_of(model: Any) -> Any:
    """The DeepSpeed engine of a prepared model (an ``Actor`` or an engine)."""
    from openrlhf.models import Actor

    # Not by asking for `.model`: an engine hands that on to the model it holds.
    return model.model if isinstance(model, Actor) else model


def of(model: Any) -> Weights | None:
    """The weights kept beside a prepared model, if there are any."""
    return getattr(engine_of(model), "bond_weights", None)


def init_train_model(original: Any, self: Any, model: Any, cfg: dict) -> Any:
    """After the host has prepared the policy, and before it loads a checkpoint: keep the initial weights."""
    from openrlhf.models import Actor

    prepared = original(self, model, cfg)
    run = plan.of(self.args)
    model.bond_trained = True
    if isinstance(model, Actor) and (run.keeps_reference or run.needs.anchor):
        engine = prepared[0].model
        engine.bond_weights = Weights(engine, run.needs.anchor_eta, run.keeps_reference, run.needs.anchor_interval)
    return prepared


def move_states(original: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """Between two trainings (``--ds.enable_sleep``) the kept weights leave the GPU with the masters, and come back.

    The host leaves the 16-bit parameters there, so other weights can be put in their place at any time. Run on CPU
    alone; that the masters change their device on a GPU was read in DeepSpeed 0.19.6 (``offload_states``).
    """
    original(model, *args, **kwargs)
    kept = of(model)
    if kept is not None:
        kept.follow_masters()


def save_model(original: Any, self: Any, model: Any, tokenizer: Any, output_dir: str, **kwargs: Any) -> None:
    """The final model is the policy; ``--bond.save_anchor`` writes the anchor beside it."""
    original(self, model, tokenizer, output_dir, **kwargs)
    kept = of(model)
    anchored = kept is not None and "anchor" in kept and self.args.bond.save_anchor
    if anchored and output_dir == self.args.ckpt.output_dir:
        with kept.swapped_in("anchor"):
            original(self, model, tokenizer, os.path.join(output_dir, "anchor"), **kwargs)


# What the trainer asks of each training worker (through Ray).


def broadcast(actor: Any, name: str) -> None:
    """Send the weights ``name`` to the rollout engines, by the host's own way of sending the policy's."""
    with of(actor.actor).swapped_in(name):
        actor.trainer.broadcast_to_vllm()

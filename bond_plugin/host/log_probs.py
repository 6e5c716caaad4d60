"""Log-probabilities under other weights, from the policy's own workers: no reference model on any GPU.

The host asks the policy's workers for log-probabilities, and then those of its reference model. Here the first call
brings all that are wanted: each worker computes its share under the policy, swaps other weights in and computes it
again (:class:`~bond_plugin.host.weights.Weights`), so sequences travel once. What stands in the reference model's
place is :data:`SLOT`, which has the answer already. Splitting, ring attention's copies, images and colocation are the
host's.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor

from bond_plugin.host import classifier, flags, logits, plan, state, weights

#: In the place of a group of workers: answered from what the policy's workers have sent.
SLOT = "the policy's workers"

#: For ``bond/kl_ref`` alone, one row of so many is scored under the initial policy.
_REPORTED = 4


class OfTeacher(NamedTuple):
    """References to what the reference model's workers say, where that is a teacher."""

    refs: Any


def execute_batch(original: Any, self: Any, method_name: str, all_data: dict, start_idx: int, end_idx: int) -> list:
    """A worker's share of a call: the policy's forward passes also under the other weights that are wanted, and the
    classifier's logits for what the host takes for a critic's values.

    Returns:
        Of each micro-batch what the host's gives; or by the weights, ``policy`` among them, ``[B, A]``
        log-probabilities. Rows are NaN where nothing but a report wants them, and they are not in it.
    """
    run = plan.of(self.strategy.args)
    if method_name == "forward" and hasattr(self, "critic") and run.needs.classifier:
        return classifier.logits(self, all_data, start_idx, end_idx)
    found = original(self, method_name, all_data, start_idx, end_idx)
    kept = weights.of(getattr(self, "actor", None))
    if kept is None or method_name != "forward" or not run.log_probs:
        return found
    under = {"policy": found}
    for name in run.log_probs:
        with kept.swapped_in(name):
            if name == "reference" and run.kl_from_few:
                under[name] = _of_few(original, self, all_data, start_idx, end_idx)
            else:
                under[name] = original(self, method_name, all_data, start_idx, end_idx)
    return [dict(zip(under, each, strict=True)) for each in zip(*under.values(), strict=True)]


def _of_few(original: Any, self: Any, all_data: dict, start: int, end: int) -> list[Tensor]:
    """The forward passes of one micro-batch of :data:`_REPORTED`, which round as the policy's do; where there are too
    few of them, of one row of so many. Images belong to no row of their own. The same on all ranks.
    """
    args = self.strategy.args
    whole = args.train.dynamic_batch_enable or args.data.max_images_per_prompt > 0
    whole = whole or args.rollout.micro_batch_size < _REPORTED or end - start >= _REPORTED
    batches, rows = (_REPORTED, 1) if whole else (1, _REPORTED)
    data = {
        key: [each[::rows] if isinstance(each, Tensor) else each for each in values[start:end:batches]]
        for key, values in all_data.items()
    }
    found = [torch.full(mask.shape, math.nan) for mask in all_data["action_mask"][start:end]]
    scored = original(self, "forward", data, 0, len(data["action_mask"]))
    for each, values in zip(found[::batches], scored, strict=True):
        each[::rows] = values.float()
    return found


def dispatch_forward(original: Any, self: Any, group: Any, sync_condition: bool, **kwargs: Any) -> Any:
    """The experience maker's calls; :data:`SLOT` needs none, and the classifier's time is taken."""
    if group is SLOT:
        return SLOT
    started = time.time()
    refs = original(self, group, sync_condition, **kwargs)
    if group is self.initial_model_group and plan.of(self.args).taught:
        return OfTeacher(refs)
    if group is self.critic_model_group and plan.of(self.args).needs.classifier:
        ray.get(refs)
        state.of(self).timings["timing/classifier"] = time.time() - started
    return refs


def flatten_results(original: Any, self: Any, refs: Any, duplicate_factor: int) -> list:
    """The experience maker's results: keep what came along with the policy's, and give :data:`SLOT`'s answer."""
    if refs is SLOT:
        return state.of(self).log_probs[plan.of(self.args).in_slot]
    if isinstance(refs, OfTeacher):
        found, kept = original(self, refs.refs, duplicate_factor), state.of(self)
        if plan.of(self.args).needs.logits:
            for layer in (ray.put(each.layer) for each in found if each.layer is not None):
                workers = self.actor_model_group._actor_handlers
                ray.get([worker.__ray_call__.remote(logits.take_layer, layer) for worker in workers])
            kept.hidden, found = [each.hidden for each in found], [each.log_probs for each in found]
        kept.log_probs["teacher"] = found
        return found
    found = original(self, refs, duplicate_factor)
    if found and isinstance(found[0], dict):
        kept = state.of(self)
        kept.log_probs = {name: [each[name] for each in found] for name in found[0]}
        found = kept.log_probs.pop("policy")
    return found


def group_init(original: Any, self: Any, num_nodes: int, num_gpus_per_node: int, ray_actor_type: Any, *args: Any,
               **kwargs: Any) -> None:  # fmt: skip
    """A group of the host's workers. Of reference models there are none where a moving reference takes the place, and
    ``--ref.model_name_or_path`` names another one than the initial policy.
    """
    from openrlhf.trainer.ray.launcher import ReferenceModelActor

    asked = flags.current()
    is_reference = ray_actor_type is ReferenceModelActor and asked is not None
    if is_reference and plan.of(asked.args).moving_reference:
        self._actor_handlers = []
        return
    original(self, num_nodes, num_gpus_per_node, ray_actor_type, *args, **kwargs)
    if is_reference and asked.args.ref.model_name_or_path:
        load = self.async_init_model_from_pretrained
        self.async_init_model_from_pretrained = lambda strategy, _: load(strategy, asked.args.ref.model_name_or_path)

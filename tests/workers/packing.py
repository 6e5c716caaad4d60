"""Run in one process: the host's own models on rows of unequal length, packed and padded.

usage: packing.py MODEL OUT.json
"""

import json
import sys

from device import DEVICE

# isort: split

import torch
from openrlhf.models import Actor, get_llm_for_sequence_regression

folder, out = sys.argv[1:]
data = torch.Generator().manual_seed(0)
# Padded on the left as prompts are and on the right as responses are; one row of a single token, and equal lengths.
bounds = [(0, 20), (7, 13), (3, 4), (11, 17), (5, 20)]
mask = torch.tensor([[int(first <= t < last) for t in range(20)] for first, last in bounds])
ids = (torch.randint(2, 28, mask.shape, generator=data) * mask).to(DEVICE)
mask = mask.to(DEVICE)
action_mask = (mask[:, 1:] & mask[:, :-1])[:, -16:]
weights = torch.randn(action_mask.shape, generator=data).to(DEVICE)
#: By type of the weights. On a GPU it is flash-attn's kernels that are asked about, and they take 16 bits.
ATTENTION = (
    {"fp32": ("sdpa", "eager"), "bf16": ("sdpa", "eager")} if DEVICE == "cpu" else {"bf16": ("flash_attention_2",)}
)


def policy(dtype: str, attention: str, packed: bool) -> dict:
    actor = Actor(folder, attn_implementation=attention, param_dtype=dtype, packing_samples=packed, temperature=0.7)
    actor.to(DEVICE)
    log_probs, output = actor(ids, action_mask, mask, return_output=True, return_entropy=True)
    entropy = output.entropy[:, -16:] * action_mask
    ((log_probs + 0.3 * entropy) * weights).sum().backward()
    gradient = torch.cat([p.grad.float().flatten() for p in actor.parameters()])
    return {"log_probs": log_probs.detach(), "entropy": entropy.detach(), "gradient": gradient}


def values(kind: str, dtype: str, attention: str, packed: bool, state: dict | None) -> tuple[dict, dict]:
    model = get_llm_for_sequence_regression(
        folder, kind, attn_implementation=attention, param_dtype=dtype, packing_samples=packed, init_value_head=True
    )
    model.to(DEVICE)
    if state is not None:
        model.load_state_dict(state)
    found = model(ids, mask) if kind == "reward" else model(ids, action_mask=action_mask, attention_mask=mask)
    found.square().sum().backward()
    gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    return {"values": found.detach().float(), "gradient": gradient}, model.state_dict()


def apart(packed: dict, padded: dict) -> dict[str, float]:
    """The largest difference of each; of a gradient the norm of the difference, relative."""
    found = {}
    for name, one in packed.items():
        assert one.abs().sum() > 0, name
        other = padded[name]
        found[name] = (one - other).abs().max().item()
        if name == "gradient":
            found[name] = ((one - other).norm() / other.norm()).item()
    return found


found = {}
for dtype, attentions in ATTENTION.items():
    for attention in attentions:
        found[f"policy {attention} {dtype}"] = apart(*(policy(dtype, attention, packed) for packed in (True, False)))
    for kind in ("reward", "critic"):
        padded, state = values(kind, dtype, attentions[0], False, None)
        found[f"{kind} {attentions[0]} {dtype}"] = apart(values(kind, dtype, attentions[0], True, state)[0], padded)
with open(out, "w") as file:
    json.dump(found, file)

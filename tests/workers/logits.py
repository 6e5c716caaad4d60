"""Run in one process: the host's Actor with the logits of response tokens alone, and as it is.

usage: logits.py MODEL OUT.json
"""

import json
import sys
import tempfile
from types import SimpleNamespace

from device import DEVICE

# isort: split

import torch
from openrlhf.models import Actor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from bond_plugin.algorithms.sinkd import SinKD, SinKDConfig
from bond_plugin.host import logits

folder, out = sys.argv[1:]
data = torch.Generator().manual_seed(0)
bounds = [(0, 20), (7, 13), (3, 5), (11, 17), (5, 20)]
mask = torch.tensor([[int(first <= t < last) for t in range(20)] for first, last in bounds])
ids = torch.randint(2, 28, mask.shape, generator=data) * mask
action_mask = (mask[:, 1:] & mask[:, :-1])[:, -12:]
weights = torch.randn(2, *action_mask.shape, generator=data)
ids, mask, action_mask, weights = (part.to(DEVICE) for part in (ids, mask, action_mask, weights))


def limit(mebibytes: float) -> None:
    logits.limit_to(SimpleNamespace(bond=SimpleNamespace(logits_mb=mebibytes)))


def computed(actor: Actor, entropy: bool) -> dict[str, torch.Tensor]:
    """Log-probabilities in a training step and without gradient, the entropy, and the gradient of all parameters."""
    actor.zero_grad()
    found = actor(ids, action_mask, mask, return_output=True, return_entropy=entropy)
    log_probs, output = found
    loss = (log_probs * weights[0]).sum()
    results = {"log_probs": log_probs.detach(), "outputs": torch.tensor(float(output["logits"].numel()))}
    if entropy:
        results["entropy"] = (output.entropy[:, -12:] * action_mask).detach()
        loss = loss + (output.entropy[:, -12:] * action_mask * weights[1]).sum()
    loss.backward()
    results["gradient"] = torch.cat([p.grad.float().flatten() for p in actor.parameters()])
    with torch.no_grad():
        results["scored"] = actor(ids, action_mask, mask)
    return results


found = {}
for dtype in ("fp32", "bf16") if DEVICE == "cpu" else ("bf16",):
    for packed in (False, True):
        attention = "sdpa" if DEVICE == "cpu" else "flash_attention_2"
        actor = Actor(
            folder, attn_implementation=attention, param_dtype=dtype, packing_samples=packed, temperature=0.7
        )
        actor.to(DEVICE)
        for entropy in (False, True):
            limit(0)
            plain = computed(actor, entropy)
            # All at once; seven tokens at a time.
            for name, size in (("one piece", 1), ("pieces", 7.5 * 4 * actor.model.config.vocab_size / 2**20)):
                limit(size)
                ours = computed(actor, entropy)
                apart = {key: (ours[key] - plain[key]).abs().max().item() for key in ours if key != "outputs"}
                apart["gradient"] = ((ours["gradient"] - plain["gradient"]).norm() / plain["gradient"].norm()).item()
                apart["outputs"] = ours["outputs"].item() / plain["outputs"].item()
                found[f"{dtype}{' packed' * packed}{' entropy' * entropy}, {name}"] = apart

# A soft cap after the output layer: only the host's way is right, and is taken.
config = Gemma2Config(
    vocab_size=28, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
with tempfile.TemporaryDirectory() as other:
    Gemma2ForCausalLM(config).save_pretrained(other)
    actor = Actor(other, attn_implementation="eager", param_dtype="fp32").to(DEVICE)
limit(0)
plain = computed(actor, True)
limit(1)
ours = computed(actor, True)
found["soft cap"] = {key: (ours[key] - plain[key]).abs().max().item() for key in ours}

# A loss on logits, beside those of a teacher of another width, some tokens at a time.
algorithm = SinKD(SinKDConfig(sinkhorn=0.0, forward_kl=1.0, backward_kl=0.5))
with tempfile.TemporaryDirectory() as other:
    config = LlamaConfig.from_pretrained(folder, hidden_size=24, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(other)
    dtype = "fp32" if DEVICE == "cpu" else "bf16"
    for packed in (False, True):
        options = {"param_dtype": dtype, "packing_samples": packed, "temperature": 0.7}
        policy, teacher = (
            Actor(name, attn_implementation=attention, **options).to(DEVICE) for name in (folder, other)
        )

        def whole(actor: Actor) -> torch.Tensor:
            shown = actor(ids, attention_mask=mask, return_output=True, allgather_logits=True)["logits"]
            return shown.reshape(*ids.shape, -1)[:, :-1][:, -12:][action_mask.bool()].log_softmax(dim=-1)

        limit(0)
        with torch.no_grad():
            taught = whole(teacher)
        direct = algorithm._divergences(whole(policy), taught)
        (direct * weights[0][action_mask.bool()]).sum().backward()
        wanted = torch.cat([p.grad.float().flatten() for p in policy.parameters()])
        policy.zero_grad()

        limit(7.5 * 8 * config.vocab_size / 2**20)
        policy.bond_trained, logits._needs_logits, logits._sent = True, True, False
        with torch.no_grad():
            told = teacher(ids, action_mask, mask).to("cpu")
        assert [len(row) for row in told.hidden] == action_mask.sum(dim=-1).tolist()
        logits.take_layer(None, told.layer)
        beside = logits.OnLogits(algorithm.token_losses, torch.cat(told.hidden))
        policy.bond_on_logits = beside
        policy(ids, action_mask, mask, return_output=True)
        (beside.values * weights[0][action_mask.bool()]).sum().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in policy.parameters()])
        found["taught" + " packed" * packed] = {
            "losses": (beside.values - direct).abs().max().item(),
            "gradient": ((gradient - wanted).norm() / wanted.norm()).item(),
            "of": direct.mean().item(),
        }
with open(out, "w") as file:
    json.dump(found, file)

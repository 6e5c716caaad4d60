"""Log-probabilities of the responses' tokens, without the logits of all others.

The host's ``Actor`` multiplies every hidden state, those of prompts and of padding too, by the output layer, and
holds ``[tokens, vocabulary]`` numbers in fp32, more than once for the gradient. Here the output layer itself, for
the time of one call, gives back the log-probability (and entropy) of each response token: only their logits are
made, ``--bond.logits_mb`` at a time, and made anew for the gradient where they are more than that. Everything before
and after is the host's: positions, packing, the mask. The reference model's worker and a teacher's do the same.
(A fused kernel would not do: those that are kept, liger-kernel's among them, want the loss to be linear in the
log-probabilities, or one of their own losses.)

The host's way is taken with ring attention and images, and where the model does more to its logits than to multiply
(a soft cap, say). That is seen: what the output layer gave must be what the model hands on.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_MEBIBYTE = 2**20

#: Beside each token's two numbers, to be found again in what the model hands on.
_MARK = 12345.0

_limit = 0  # bytes of fp32 logits at a time in this process; 0: the host's way
_call: _Call | None = None  # the one that is being computed


class _NotHandedOn(Exception):
    """The model does something to what its output layer gives."""


def limit_to(args: SimpleNamespace) -> None:
    """Take ``--bond.logits_mb`` for this process."""
    global _limit
    _limit = int(getattr(getattr(args, "bond", None), "logits_mb", 0) * _MEBIBYTE)


class _Call:
    """One micro-batch: of which positions the log-probability of which token is wanted.

    Args:
        kept: ``[N]`` bool, of all positions that go through the model, those before a response token.
        labels: ``[K]``, the tokens that follow them.
        temperature: by which logits are divided.
        entropy: whether it is wanted too.
        limit: bytes of fp32 logits at a time.
    """

    def __init__(self, kept: Tensor, labels: Tensor, temperature: float, entropy: bool, limit: int) -> None:
        self._kept, self._labels = kept, labels
        self._temperature, self._entropy, self._limit = temperature, entropy, limit

    def through(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """What stands for the logits: ``[..., 3]`` fp32, log-probability, entropy and mark of each position."""
        flat = hidden.flatten(0, -2)
        if len(flat) != len(self._kept):
            raise _NotHandedOn
        flat = flat[self._kept]
        size = max(1, self._limit // (4 * layer.weight.shape[0]))
        pieces = zip(flat.split(size), self._labels.split(size), strict=True)
        if len(flat) > size and torch.is_grad_enabled():
            made = [checkpoint(self._of, layer, *piece, use_reentrant=False, preserve_rng_state=False)
                    for piece in pieces]  # fmt: skip
        else:
            made = [self._of(layer, *piece) for piece in pieces]
        empty = flat.new_zeros(len(self._kept), 3, dtype=torch.float32)
        empty[:, 2] = _MARK
        found = nn.functional.pad(torch.cat(made), (0, 1), value=_MARK)
        return empty.index_copy(0, self._kept.nonzero().flatten(), found).unflatten(0, hidden.shape[:-1])

    def _of(self, layer: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
        """``[K, 2]`` of some positions. In the model's precision first, as the host does."""
        logits = type(layer).forward(layer, hidden).float()
        if self._temperature != 1.0:
            logits = logits / self._temperature
        total = logits.logsumexp(dim=-1)
        found = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - total
        entropy = total - (logits.softmax(dim=-1) * logits).sum(dim=-1) if self._entropy else torch.zeros_like(total)
        return torch.stack([found, entropy], dim=-1)


def forward(original: Any, self: Any, sequences: Tensor, action_mask: Tensor | None = None,
            attention_mask: Tensor | None = None, return_output: bool = False, **options: Any) -> Any:  # fmt: skip
    """The host's ``Actor.forward``, where it is asked for the log-probabilities of responses."""
    global _call

    def plain() -> Any:
        return original(self, sequences, action_mask, attention_mask, return_output, **options)

    layer = _output_layer(self)
    others = set(options) - {"ring_attn_group", "packed_seq_lens", "return_entropy"}  # images, or other results
    ours = _limit and layer is not None and action_mask is not None and not others
    if not ours or options.get("ring_attn_group") is not None:
        return plain()
    length = action_mask.shape[1]
    kept = torch.zeros_like(sequences, dtype=torch.bool)
    kept[:, -1 - length : -1] = action_mask.bool()
    kept[0, 0] |= not kept.any()  # a graph there must be
    labels = sequences.roll(shifts=-1, dims=1)
    within = attention_mask.bool() if self.packing_samples else torch.ones_like(kept)
    kept, labels = kept[within], labels[within]
    temperature, self.temperature = self.temperature, 1.0
    _call = _Call(kept, labels[kept], temperature, bool(options.get("return_entropy")), _limit)
    layer.forward = lambda hidden: _call.through(layer, hidden)
    try:
        return plain()
    except _NotHandedOn:
        print("bond: note: this model changes its logits after the output layer: --bond.logits_mb 0", flush=True)
        self.bond_plain_logits = True
    finally:
        _call, self.temperature = None, temperature
        del layer.forward
    return plain()


def _output_layer(actor: Any) -> nn.Linear | None:
    """The model's last layer, if it is a plain one."""
    if getattr(actor, "bond_plain_logits", False):
        return None
    model = getattr(actor.model, "module", actor.model)  # of a DeepSpeed engine
    layer = model.get_output_embeddings()
    return layer if type(layer) is nn.Linear and "forward" not in vars(layer) else None


def log_probs_from_logits(original: Any, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """In the host's ``Actor``: they are there already."""
    return original(logits, labels, temperature) if _call is None else _checked(logits)[..., 0]


def compute_entropy(original: Any, logits: Tensor) -> Tensor:
    """In the host's ``Actor``: it is there already."""
    return original(logits) if _call is None else _checked(logits)[..., 1]


def _checked(logits: Tensor) -> Tensor:
    if logits.shape[-1] != 3 or not (logits[..., 2] == _MARK).all():
        raise _NotHandedOn
    return logits

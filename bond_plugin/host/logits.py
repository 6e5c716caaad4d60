"""Log-probabilities of the responses' tokens, without the logits of all others.

The host's ``Actor`` multiplies every hidden state, those of prompts and of padding too, by the output layer, and
holds ``[tokens, vocabulary]`` numbers in fp32, more than once for the gradient. Here the output layer itself, for
the time of one call, gives back the log-probability (and entropy) of each response token: only their logits are
made, and in fp32 ``--bond.logits_mb`` of them at a time. Everything before and after is the host's: positions,
packing, the mask. The reference model's worker and a teacher's do the same.
(A fused kernel would not do: those that are kept, liger-kernel's among them, want the loss to be linear in the
log-probabilities, or one of their own losses.)

The host's way is taken with ring attention and images, and where the model does more to its logits than to multiply
(a soft cap, say). That is seen: what the output layer gave must be what the model hands on.

In the same place an algorithm's loss on logits is computed (:class:`~bond_plugin.algorithms.logits.Logits`). A
teacher's logits are many, and its hidden states few: its workers send those, row by row, and its output layer once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bond_plugin.algorithms.assemble import checked
from bond_plugin.algorithms.logits import Head, Logits
from bond_plugin.host import plan

#: Beside each token's three numbers, to be found again in what the model hands on.
_MARK = 12345.0

#: Where ``Experience.info`` holds the teacher's hidden states, ``[tokens, H]`` a row.
HIDDEN = "bond_hidden"

_limit = 0  # bytes of fp32 logits at a time in this process; 0: the host's way
_needs_logits = False  # whether the run's loss is on them
_sent = False  # whether this process, a teacher's, has sent its output layer
_call: _Call | None = None  # the one that is being computed
_layer: tuple[Tensor | None, ...] = ()  # the teacher's output layer, in the policy's workers


class _NotHandedOn(Exception):
    """The model does something to what its output layer gives."""


def limit_to(args: SimpleNamespace) -> None:
    """Take ``--bond.logits_mb``, and what the run needs, for this process."""
    global _limit, _needs_logits
    _limit, _needs_logits = plan.in_bytes(args, "logits_mb"), plan.of(args).needs.logits


@dataclass
class _Call:
    """One micro-batch: of which positions the log-probability of which token is wanted.

    Attributes:
        kept: ``[N]`` bool, of all positions that go through the model, those before a response token.
        labels: ``[K]``, the tokens that follow them.
        temperature: by which logits are divided.
        entropy: whether it is wanted too.
        beside: what is told of the hidden states too.
    """

    kept: Tensor
    labels: Tensor
    temperature: float
    entropy: bool
    beside: OnLogits | Taught | None

    def through(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """What stands for the logits: ``[..., 4]`` fp32, log-probability, entropy, loss and mark of each position."""
        flat = hidden.flatten(0, -2)
        if len(flat) != len(self.kept):
            raise _NotHandedOn
        flat = flat[self.kept]
        size = max(1, _limit // (4 * layer.weight.shape[0]))
        keep = torch.is_grad_enabled()
        made = _Pieces.apply(flat, layer.weight, layer.bias, self.labels, self.temperature, self.entropy, size, keep)
        losses = None if self.beside is None else self.beside.at(layer, flat, self.temperature)
        losses = torch.zeros_like(made[:, 0]) if losses is None else losses.float()
        empty = flat.new_zeros(len(self.kept), 4, dtype=torch.float32)
        empty[:, 3] = _MARK
        found = nn.functional.pad(torch.column_stack([made, losses]), (0, 1), value=_MARK)
        return empty.index_copy(0, self.kept.nonzero().flatten(), found).unflatten(0, hidden.shape[:-1])


@dataclass
class OnLogits:
    """An algorithm's loss on logits, of the calls of ``Actor.forward`` while it is the actor's ``bond_on_logits``.

    Attributes:
        losses: the algorithm's method.
        teacher: ``[K, H]``, hidden states of the teacher at the same tokens.
        values: of the last call, ``[K]``, with gradient.
    """

    losses: Callable[[Logits], Tensor]
    teacher: Tensor
    values: Tensor | None = None

    def at(self, layer: nn.Linear, hidden: Tensor, temperature: float) -> Tensor | None:
        """``[K]`` of an output layer and what it is given; ``None`` if no response has a token."""
        if not len(self.teacher):
            return None
        teacher = Head(self.teacher.to(hidden.device), *_layer)
        found = self.losses(Logits(Head(hidden, layer.weight, layer.bias), teacher, temperature, _limit))
        return checked("token_losses", found, hidden.shape[:1])


@dataclass
class Taught:
    """What a teacher's worker says of one micro-batch, in the place of its log-probabilities.

    Attributes:
        log_probs: ``[B, A]``, all that the host knows of.
        hidden: of each row's response tokens, ``[tokens, H]``.
        layer: weight and bias of the output layer, of the first worker's first micro-batch; else ``None``.
    """

    log_probs: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    layer: tuple[Tensor | None, ...] | None = None

    def at(self, layer: nn.Linear, hidden: Tensor, temperature: float) -> None:
        """Keep what an output layer is given."""
        global _sent
        self.hidden = [hidden.cpu()]
        if not _sent and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            self.layer = tuple(None if part is None else part.detach().cpu() for part in (layer.weight, layer.bias))
        _sent = True

    def to(self, device: Any) -> Taught:
        """As the host's worker calls it."""
        return self


def take_layer(worker: Any, layer: tuple[Tensor | None, ...]) -> None:
    """In a worker of the policy: the teacher's output layer."""
    global _layer
    _layer = tuple(part if part is None else part.to(torch.cuda.current_device()) for part in layer)


class _Pieces(torch.autograd.Function):
    """Log-probability and entropy of each label, ``[K, 2]`` fp32, ``size`` positions at a time.

    For the gradient logits are kept as the output layer gives them (in 16 bits, if that is what the model has).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float,
                entropy: bool, size: int, keep: bool) -> Tensor:  # fmt: skip
        found = hidden.new_zeros(len(hidden), 3, dtype=torch.float32)  # log-probability, entropy, log of the sum
        kept = []
        for rows, of, out in zip(hidden.split(size), labels.split(size), found.split(size), strict=True):
            raw = nn.functional.linear(rows, weight, bias)
            logits = _scaled(raw, temperature)
            out[:, 2] = logits.logsumexp(dim=-1)
            out[:, 0] = logits.gather(-1, of.unsqueeze(-1)).squeeze(-1) - out[:, 2]
            if entropy:
                out[:, 1] = out[:, 2] - (logits.softmax(dim=-1) * logits).sum(dim=-1)
            if keep:
                kept.append(raw)
        ctx.temperature, ctx.entropy, ctx.size = temperature, entropy, size
        ctx.save_for_backward(hidden, weight, bias, labels, found, *kept)
        return found[:, :2].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of z = logits / temperature: (onehot - p) for the log-probability, -p (z - sum p z) for the entropy."""
        hidden, weight, bias, labels, found, *kept = ctx.saved_tensors
        of_hidden, of_weight, of_bias = torch.empty_like(hidden), None, None
        parts = (part.split(ctx.size) for part in (hidden, labels, found, gradient, of_hidden))
        for raw, rows, of, known, given, out in zip(kept, *parts, strict=True):
            logits = _scaled(raw, ctx.temperature)
            total, log_prob = known[:, 2:], given[:, :1]
            shares = (logits - total).exp_()
            if ctx.entropy:
                mean = total - known[:, 1:2]
                shares.mul_(logits.sub_(mean).mul_(given[:, 1:]).add_(log_prob)).neg_()
            else:
                shares.mul_(-log_prob)
            shares.scatter_add_(-1, of.unsqueeze(-1), log_prob)
            each = shares.div_(ctx.temperature).to(raw.dtype)
            out.copy_(nn.functional.linear(each, weight.t()))
            part = nn.functional.linear(each.t(), rows.t())
            of_weight = part if of_weight is None else of_weight.add_(part)
            if bias is not None:
                of_bias = each.sum(dim=0) if of_bias is None else of_bias.add_(each.sum(dim=0))
        return of_hidden, of_weight, of_bias, *[None] * 5


def _scaled(raw: Tensor, temperature: float) -> Tensor:
    """In fp32, as the host does it."""
    logits = raw.float() if raw.dtype != torch.float32 else raw.clone()
    return logits if temperature == 1.0 else logits.div_(temperature)


def forward(original: Any, self: Any, sequences: Tensor, action_mask: Tensor | None = None,
            attention_mask: Tensor | None = None, return_output: bool = False, **options: Any) -> Any:  # fmt: skip
    """The host's ``Actor.forward``, where it is asked for the log-probabilities of responses."""
    global _call
    teaches = _needs_logits and not getattr(self, "bond_trained", False)
    beside = Taught() if teaches else getattr(self, "bond_on_logits", None)
    layer = _output_layer(self)
    others = set(options) - {"ring_attn_group", "packed_seq_lens", "return_entropy"}  # images, or other results
    ours = _limit and layer is not None and action_mask is not None and not others
    if not ours or options.get("ring_attn_group") is not None:
        if beside is not None:
            raise RuntimeError(
                "a loss on logits needs a model, and a teacher, whose logits are what one linear layer gives, "
                "unchanged"
            )
        return original(self, sequences, action_mask, attention_mask, return_output, **options)
    length = action_mask.shape[1]
    kept = torch.zeros_like(sequences, dtype=torch.bool)
    kept[:, -1 - length : -1] = action_mask.bool()
    kept[0, 0] |= not kept.any()  # a graph there must be
    labels = sequences.roll(shifts=-1, dims=1)
    within = attention_mask.bool() if self.packing_samples else torch.ones_like(kept)
    kept, labels = kept[within], labels[within]
    temperature, self.temperature = self.temperature, 1.0
    _call = _Call(kept, labels[kept], temperature, bool(options.get("return_entropy")), beside)
    layer.forward = lambda hidden: _call.through(layer, hidden)
    try:
        found = original(self, sequences, action_mask, attention_mask, return_output, **options)
        if not teaches:
            return found
        counts = action_mask.sum(dim=-1).tolist()
        beside.log_probs, (hidden,) = found.cpu(), beside.hidden
        beside.hidden = list(hidden[: sum(counts)].split(counts))
        return beside
    except _NotHandedOn:
        print("bond: note: this model changes its logits after the output layer: --bond.logits_mb 0", flush=True)
        self.bond_plain_logits = True
    finally:
        _call, self.temperature = None, temperature
        del layer.forward
    return forward(original, self, sequences, action_mask, attention_mask, return_output, **options)


def _output_layer(actor: Any) -> nn.Linear | None:
    """The model's last layer, if it is a plain one."""
    if getattr(actor, "bond_plain_logits", False):
        return None
    model = getattr(actor.model, "module", actor.model)  # of a DeepSpeed engine
    layer = model.get_output_embeddings()
    return layer if type(layer) is nn.Linear and "forward" not in vars(layer) else None


def log_probs_from_logits(original: Any, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """In the host's ``Actor``: they are there already."""
    if _call is None:
        return original(logits, labels, temperature)
    found = _checked(logits)
    if isinstance(_call.beside, OnLogits):
        _call.beside.values = found[..., 2].flatten()[_call.kept]
    return found[..., 0]


def compute_entropy(original: Any, logits: Tensor) -> Tensor:
    """In the host's ``Actor``: it is there already."""
    return original(logits) if _call is None else _checked(logits)[..., 1]


def _checked(logits: Tensor) -> Tensor:
    if logits.shape[-1] != 4 or not (logits[..., 3] == _MARK).all():
        raise _NotHandedOn
    return logits

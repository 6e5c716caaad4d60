"""Log-probabilities of the responses' tokens, without the logits of all others.

The host's ``Actor`` multiplies every hidden state, those of prompts and of padding too, by the output layer, and
holds ``[tokens, vocabulary]`` numbers in fp32, more than once for the gradient. Here the output layer itself, for
the time of one call, gives back the log-probability (and entropy) of each response token: only their logits are
made, and in fp32 a piece of them at a time, at most ``--bond.logits_mb``. Everything before and after is the host's:
positions, packing, the mask. The reference model's worker and a teacher's do the same.
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
        how = (self.temperature, self.entropy, _limit, torch.is_grad_enabled())
        made = _Pieces.apply(flat, layer.weight, layer.bias, self.labels, *how)
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
    """Log-probability and entropy of each label, ``[K, 2]`` fp32, with no more than pieces of the logits in fp32.

    For the gradient logits are kept as the output layer gives them (in 16 bits, if that is what the model has).
    Forward a piece is some tokens with all words, as the host sums them up; backward it is some words of all tokens,
    so that each weight's gradient is one product, rounded once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float,
                entropy: bool, limit: int, keep: bool) -> Tensor:  # fmt: skip
        found = hidden.new_zeros(len(hidden), 3, dtype=torch.float32)  # log-probability, entropy, log of the sum
        kept = nn.functional.linear(hidden, weight, bias) if keep else None
        size = _at_a_time(limit, len(hidden), len(weight)) if keep else max(1, limit // (4 * len(weight)))
        source = hidden if kept is None else kept
        for rows, of, out in zip(source.split(size), labels.split(size), found.split(size), strict=True):
            logits = _scaled(nn.functional.linear(rows, weight, bias) if kept is None else rows, temperature)
            out[:, 2] = logits.logsumexp(dim=-1)
            out[:, 0] = logits.gather(-1, of.unsqueeze(-1)).squeeze(-1) - out[:, 2]
            if entropy:
                out[:, 1] = out[:, 2] - (logits.softmax(dim=-1) * logits).sum(dim=-1)
        ctx.temperature, ctx.entropy, ctx.limit = temperature, entropy, limit
        ctx.save_for_backward(hidden, weight, bias, labels, found, kept)
        return found[:, :2].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of z = logits / temperature: (onehot - p) for the log-probability, -p (z - sum p z) for the entropy."""
        hidden, weight, bias, labels, found, kept = ctx.saved_tensors
        of_hidden, of_weight = torch.zeros_like(hidden, dtype=torch.float32), torch.empty_like(weight)
        of_bias = None if bias is None else torch.empty_like(bias)
        total, log_prob = found[:, 2:], gradient[:, :1]
        size = _at_a_time(ctx.limit, len(weight), len(hidden))
        for start in range(0, len(weight), size):
            words = slice(start, start + size)
            shares = _scaled(kept[:, words], ctx.temperature).sub_(total)  # their logarithm
            if ctx.entropy:
                beside = (shares + found[:, 1:2]).mul_(gradient[:, 1:]).add_(log_prob)
                shares.exp_().mul_(beside.neg_())
                del beside
            else:
                shares.exp_().mul_(-log_prob)
            rows = ((labels >= start) & (labels < start + size)).nonzero().flatten()
            shares[rows, labels[rows] - start] += log_prob[rows, 0]
            each = shares.div_(ctx.temperature).to(kept.dtype)
            of_hidden += nn.functional.linear(each, weight[words].t())
            torch.mm(each.t(), hidden, out=of_weight[words])
            if of_bias is not None:
                torch.sum(each, dim=0, out=of_bias[words])
        return of_hidden.to(hidden.dtype), of_weight, of_bias, *[None] * 5


def _at_a_time(limit: int, count: int, others: int) -> int:
    """Of ``count`` words or tokens, with ``others`` numbers in fp32 each: a 32nd, but no piece below 4 MiB."""
    return max(1, min(limit // (4 * others), max(-(-count // 32), 2**20 // others)))


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

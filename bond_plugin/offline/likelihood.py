"""What models make of given responses: log-probabilities, and the KL and entropy that follow from whole next-token
distributions. torch and transformers are imported when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_ROWS_AT_A_TIME = 256
_LOGITS_AT_A_TIME = 2**25  # elements: 128 MB in float32, of which a batch needs about six


class VocabularyError(ValueError):
    """The models' vocabularies differ in size."""


@dataclass(frozen=True)
class Likelihood:
    """Of P prompts with s responses each; float64, in nats a response.

    Attributes:
        log_probs: ``[models, P, s]``, log π_m(y | x): the sum over the response's tokens.
        kl: ``[P, s]``, sum over positions t of KL(π_0(. | x, y_<t) || π_1(. | x, y_<t)), each exact over the
            vocabulary; zero with one model. Over responses of π_0 its mean is KL(π_0 || π_1) of whole responses
            (Rao-Blackwellised).
        entropy: ``[P, s]``, likewise the entropy of π_0's next-token distributions, summed.
        by_token: [P][s] of ``[tokens]``, log π_0(y_t | x, y_<t).
    """

    log_probs: Tensor
    kl: Tensor
    entropy: Tensor
    by_token: list[list[Tensor]]


def load(*paths: str | Path) -> list[Any]:
    """Models in float32 without a GPU, else in their dtype. Raises VocabularyError if their sizes differ."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else "auto"
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval() for path in paths
    ]
    sizes = [_vocabulary(model) for model in models]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise VocabularyError(f"the vocabularies differ: {paths[0]} has {sizes[0]} tokens, {path} {size}")
    return models


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config().vocab_size


def measure(
    models: Sequence[Any],
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[Sequence[int]]],
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    distributions: bool = True,
) -> Likelihood:
    """Run the models over the responses. Logits are float32.

    Args:
        models: from :func:`load`; the first two are those of the KL.
        prompt_ids: [P][tokens].
        response_ids: [P][s][tokens], EOS included; as many for each prompt.
        temperature: divides the logits of all.
        progress: called with (responses done, responses in all).
        distributions: whether KL and entropy are wanted, which take longer than log-probabilities alone; else zero.
    """
    import torch

    count = len(response_ids[0])
    pairs = [(list(p), list(r)) for p, responses in zip(prompt_ids, response_ids, strict=True) for r in responses]
    longest = max(len(response) for _, response in pairs)
    rows = min(_ROWS_AT_A_TIME, max(1, _LOGITS_AT_A_TIME // (max(1, longest) * _vocabulary(models[0]))))
    found: list[Tensor] = []
    by_token: list[Tensor] = []
    for start in range(0, len(pairs), rows):
        terms = _batch(models, pairs[start : start + rows], temperature, distributions)
        found.append(terms.sum(dim=-1))
        by_token += [row[: len(pairs[start + i][1])].clone() for i, row in enumerate(terms[0])]
        if progress is not None:
            progress(min(start + rows, len(pairs)), len(pairs))
    every = torch.cat(found, dim=-1).reshape(len(models) + 2, len(prompt_ids), count)
    nested = [by_token[start : start + count] for start in range(0, len(pairs), count)]
    return Likelihood(log_probs=every[:-2], kl=every[-2], entropy=every[-1], by_token=nested)


def _batch(
    models: Sequence[Any], pairs: list[tuple[list[int], list[int]]], temperature: float, distributions: bool
) -> Tensor:
    """``[models + 2, len(pairs), tokens]`` float64: log-probabilities, KL, entropy; 0 where a response has ended.

    Prompts are padded left, responses right.
    """
    import torch

    device = models[0].device
    width = max(len(prompt) for prompt, _ in pairs)
    length = max(len(response) for _, response in pairs)
    ids = torch.zeros(len(pairs), width + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(pairs):
        span = slice(width - len(prompt), width + len(response))
        ids[row, span] = torch.tensor(prompt + response, dtype=torch.long)
        mask[row, span] = 1
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0).to(device),
    }
    targets = inputs["input_ids"][:, width:, None]
    with torch.inference_mode():
        logs = [
            torch.log_softmax(
                # One position more than the response: the logits at a token are those of the next one.
                model(**inputs, logits_to_keep=length + 1, use_cache=False).logits[:, :-1].float() / temperature,
                dim=-1,
            )
            for model in models
        ]
        by_token = [log.gather(-1, targets)[..., 0] for log in logs]
        none = torch.zeros_like(by_token[0])
        own = logs[0].exp() if distributions else None
        by_token.append(none if own is None or len(logs) == 1 else (own * (logs[0] - logs[1])).sum(dim=-1))
        by_token.append(none if own is None else -(own * logs[0]).sum(dim=-1))
    return torch.stack(by_token).double().cpu() * mask[:, width:]

"""A reward model's linear head with what is not known of it: mean - kappa std under a Gaussian posterior (FB-GVI).

    reward(text) = offset + m'(f - c) - kappa (f - c)' S (f - c) ^ (1/2)

f is the model's last hidden state at the text's last token, EOS, c the mean of f over the data, N(m, S) the posterior
of ``gaussian.py`` (arXiv 2304.05398). Best-of-N by the mean finds where the head is wrong by chance; where there were
few data the standard deviation is large. Fit it, then name the file in BOND_HEAD_FILE:

    python -m bond_plugin.rewards.posterior_head MODEL DATA --output head.safetensors

Settings, by environment variables: BOND_HEAD_FILE; BOND_HEAD_KAPPA (1); BOND_HEAD_MODEL, where the model's folder has
moved; BOND_HEAD_DEVICE (cpu), BOND_HEAD_BATCH (8). The prior of w is N(0, I / (prior s^2)) with s^2 the mean of
|f - c|^2: the reward of an ordinary text has the variance 1 / prior before any data.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bond_plugin.files import parse_json, write_whole
from bond_plugin.rewards import gaussian
from bond_plugin.rewards.calls import Batches, loaded, number, setting

FILE, KAPPA, MODEL = "BOND_HEAD_FILE", "BOND_HEAD_KAPPA", "BOND_HEAD_MODEL"
DEVICE, BATCH = "BOND_HEAD_DEVICE", "BOND_HEAD_BATCH"

_loading = threading.Lock()


class Features:
    """From texts to a model's last hidden states at their last token, which is EOS (added where it is not there).

    ``folder``: a causal language model's, or a reward model's of the host's ``train_rm``.
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer, self._model = AutoTokenizer.from_pretrained(folder), loaded(AutoModel, folder, device)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``[len(texts), hidden size]`` float32, on the CPU."""
        end = self._tokenizer.eos_token_id
        rows = [self._tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"] for text in texts]
        rows = [torch.tensor(row if row[-1:] == [end] else [*row, end]) for row in rows]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mask = pad([torch.ones_like(row) for row in rows]).to(self._model.device)
        states = self._model(pad(rows).to(self._model.device), attention_mask=mask).last_hidden_state
        return states[torch.arange(len(rows)), mask.sum(dim=-1) - 1].float().cpu()


def value(features: Tensor, head: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the reward, each ``[n]`` float32, of features ``[n, d]``."""
    centred = features.float() - head["centre"]
    return head["offset"] + centred @ head["mean"], (centred @ head["factor"]).norm(dim=-1)


def fit(features: Tensor, other: Tensor, prior: float, noise: float | None = None) -> dict[str, Tensor]:
    """The head, of comparisons or of scores.

    Args:
        features: ``[n, d]``, with comparisons of the better texts.
        other: with comparisons the features of the worse texts, ``[n, d]``; else the scores, ``[n]``.
        prior: precision of an ordinary text's reward.
        noise: standard deviation of a score around its reward; ``None`` for comparisons.
    """
    seen = features if noise is not None else torch.cat([features, other])
    centre = seen.double().mean(dim=0)
    scale = (seen.double() - centre).square().sum(dim=-1).mean().sqrt()
    offset = torch.zeros((), dtype=torch.float64)
    if noise is None:
        mean, factor = gaussian.fit((features - other).double() / scale, None, prior)
    else:
        offset = other.double().mean()
        mean, factor = gaussian.fit((features.double() - centre) / scale, other - offset, prior, noise)
    head = {"centre": centre, "mean": mean / scale, "factor": factor / scale, "offset": offset}
    return {name: part.float().contiguous() for name, part in head.items()}


@functools.cache
def _load() -> tuple[Batches, dict[str, Tensor], float]:
    from safetensors import safe_open

    path = setting(FILE, "a file made by `python -m bond_plugin.rewards.posterior_head`")
    with safe_open(path, "pt") as file:
        head = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        folder = os.environ.get(MODEL) or (file.metadata() or {}).get("model", "")
    features = Features(folder, os.environ.get(DEVICE, "cpu"))
    return Batches(features, number(BATCH, 8, 1)), head, number(KAPPA, 1.0, 0.0)


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Score each query (prompt and response, decoded with special tokens); prompts and labels are not used.

    Returns:
        `rewards`: mean - kappa std, float32 [len(queries)]. `scores`: the means. `extra_logs`: `std`, [len(queries)].

    Raises:
        ValueError, OSError: a setting, or a file that cannot be read.
    """
    with _loading:
        features, head, kappa = _load()
    mean, std = value(torch.stack(features(queries)), head)
    return {"rewards": mean - kappa * std, "scores": mean, "extra_logs": {"std": std}}


def main(argv: list[str]) -> int:
    """Fit a head and write it. Returns the exit status (2 for data that cannot be used)."""
    parser = argparse.ArgumentParser(prog="python -m bond_plugin.rewards.posterior_head", description=__doc__)
    parser.add_argument("model", help="folder of a reward model, or of any language model")
    parser.add_argument(
        "data", type=Path, help="JSON lines: chosen and rejected, or text and reward; prompt before it"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--prior", type=float, default=1.0, help="precision of an ordinary text's reward, above 0")
    parser.add_argument("--noise", type=float, help="of scores: their standard deviation around the reward, above 0")
    args = parser.parse_args(argv)
    for name in ("prior", "noise"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    keys = ("chosen", "rejected") if args.noise is None else ("text", "reward")
    first, second = [], []
    for line_number, line in enumerate(args.data.read_bytes().splitlines(), 1):
        try:
            row = parse_json(line)
            prompt = row.get("prompt", "")
            first.append(prompt + row[keys[0]])
            second.append(prompt + row[keys[1]] if args.noise is None else float(row[keys[1]]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "; scores need --noise" if args.noise is None else ""
            print(
                f"{args.data}, line {line_number}: must have {' and '.join(keys)} ({error!r}){hint}", file=sys.stderr
            )
            return 2
    if not first:
        print(f"{args.data} has no rows", file=sys.stderr)
        return 2
    features = Batches(Features(args.model), 8)
    texts = torch.stack(features(first))
    other = torch.stack(features(second)) if args.noise is None else torch.tensor(second)
    head = fit(texts, other, args.prior, args.noise)
    from safetensors.torch import save

    settings = {"model": str(Path(args.model).absolute()), "prior": f"{args.prior:g}", "noise": str(args.noise)}
    write_whole(args.output, save(head, metadata=settings))
    mean, std = value(texts, head)
    print(f"{args.output}: {len(first)} rows; reward {mean.mean():.3f}, std {std.mean():.3f} of the first texts")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

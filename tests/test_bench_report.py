"""The report of ``bond bench``, on a toy whose right numbers are known.

Rewards of the reference are Gaussian, prompt by prompt N(mu_p, 1). A policy that is the reference tilted by the
reward is N(mu_p + d, 1): KL d^2 / 2, and nothing has more reward at that KL. A method of efficiency e has the same
reward at the KL d^2 / 2 / e^2, and so the share e of the limit.
"""

from __future__ import annotations

import html.parser
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PROMPTS, SAMPLES, LEVELS = 48, 128, (4, 8, 16)
NASTY = '<script>alert("x")</script> & | `code` <img src=http://example.org/a.png>'

_Z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
_DENSITY = torch.exp(-(_Z**2) / 2) / math.sqrt(2 * math.pi) * (_Z[1] - _Z[0])


def expected_log_quantile(d: float) -> float:
    """E[log Phi(z + d)]."""
    return (_DENSITY * torch.special.log_ndtr(_Z + d)).sum().item()


def expected_best(n: int) -> float:
    """The mean of the largest of n standard normal numbers."""
    return (_DENSITY * _Z * n * torch.special.ndtr(_Z) ** (n - 1)).sum().item()


def bon_kl(n: int) -> float:
    return math.log(n) - (n - 1) / n


def evaluation(mu: Tensor, d: float, kl: float, noise: Callable[[], Tensor]) -> dict[str, Any]:
    """A policy with rewards N(mu + d, 1) and this KL to the reference; ``noise`` gives what sampling adds."""
    log_quantile = expected_log_quantile(d)
    win_rate = torch.special.ndtr(torch.tensor(d / math.sqrt(2), dtype=torch.float64)).item()
    backward = {n: kl - math.log(n) - (n - 1) * log_quantile for n in LEVELS}
    forward = {n: bon_kl(n) - d * expected_best(n) + kl for n in LEVELS}

    def spread(value: float, scale: float) -> list[float]:
        return (value + scale * noise()).tolist()

    return {
        "reward": (mu + d + 0.25 * noise()).tolist(),
        "win_rate": spread(win_rate, 0.06),
        "kl": spread(kl, 0.1 * kl),
        "quantile": spread(win_rate, 0.06),
        "log_quantile": spread(log_quantile, 0.05),
        "entropy": spread(30 - 2 * kl, 0.5),
        "length": spread(15.0, 0.3),
        "backward_kl": {str(n): spread(value, 0.1) for n, value in backward.items()},
        "forward_kl": {str(n): spread(value, 0.1) for n, value in forward.items()},
        "distinct_1": 0.6 - 0.05 * kl,
        "distinct_2": 0.9 - 0.05 * kl,
    }


def curve(d: float, kl: float, tokens: int, noise: Callable[[], Tensor]) -> dict[str, list[float | None]]:
    """A run of 40 steps that comes near its end like an exponential. Two values were not logged."""
    at = torch.linspace(0, 1, 40, dtype=torch.float64)
    reached = 1 - torch.exp(-4 * at)
    lists = {
        "generated_tokens": (at * tokens).tolist(),
        "reward": (d * reached + 0.15 * noise()[:40]).tolist(),
        "kl": (kl * reached**2).tolist(),
        "log_quantile": (-1 + 0.4 * d * reached + 0.05 * noise()[:40]).tolist(),
    }
    lists["kl"][3] = None
    lists["log_quantile"][5] = None
    return lists


METHODS = (  # key, label, name of the strength, its values with the shifts d they lead to, efficiency, relative cost
    ("jbond", "J-BOND", "gamma", {0.0: 1.5, 0.5: 1.0, 2.0: 0.6}, 0.95, 1.0),
    ("vbon", "vBoN", "n", {4: 0.7, 16: 1.2}, 0.85, 1.6),
    ("rloo", "RLOO", "kl", {0.03: 1.8, 0.1: 0.9, 0.3: 0.5}, 0.7, 0.6),
)


def write_toy(
    folder: Path, methods: Sequence[tuple] = METHODS, seeds: int = 3, failed: str = "rloo", noisy: float = 1.0
) -> Path:
    """A results folder. The last cell of the method ``failed`` has failed; ``noisy`` scales all errors of sampling."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return noisy * torch.randn(PROMPTS, generator=generator, dtype=torch.float64)

    def examples(d: float) -> list[dict[str, Any]]:
        texts = [f"a sentence at d = {d:.1f}, {NASTY}", "the film was a long one, and " * 6, ""]
        return [
            {"prompt": f"Prompt {i}: the film", "response": text, "reward": d - i} for i, text in enumerate(texts)
        ]

    mu = torch.randn(PROMPTS, generator=generator, dtype=torch.float64)
    rewards = mu.unsqueeze(-1) + torch.randn(PROMPTS, SAMPLES, generator=generator, dtype=torch.float64)
    reference = {
        "title": "Three methods on a Gaussian toy",
        "command": "bond bench toy.yaml --output-dir toy",
        "model": "toy",
        "reward": "gaussian.py",
        "max_new_tokens": 16,
        "temperature": 1.0,
        "quantile_samples": 32,
        "bon_levels": list(LEVELS),
        "prompts": [f"Prompt {i}: the film" for i in range(PROMPTS)],
        "rewards": rewards.tolist(),
        "evaluation": evaluation(mu, 0.0, 0.0, noise),
        "examples": examples(0.0),
        "seconds": 120.0,
        "generated_tokens": PROMPTS * SAMPLES * 15,
    }
    (folder / "reference.json").write_text(json.dumps(reference))
    lines = []
    for method, label, name, strengths, efficiency, cost in methods:
        for strength, d in strengths.items():
            for seed in range(1, seeds + 1):
                reached = d + 0.05 * noise()[0].item()
                kl = reached**2 / 2 / efficiency**2
                tokens = int(500_000 * cost)
                cell = {
                    "cell": f"{method} {name}={strength} seed={seed}",
                    "method": method,
                    "label": label,
                    "strength": {name: strength},
                    "seed": seed,
                    "status": "done",
                    "flags": {f"--bond.{name}": strength, "--train.seed": seed},
                    "training": {
                        "steps": 40,
                        "samples": 4000,
                        "generated_tokens": tokens,
                        "seconds": 300.0 * cost + 10 * seed,
                        "peak_memory_gib": 3.5,
                        "curve": curve(reached, kl, tokens, noise),
                    },
                    "evaluation": evaluation(mu, reached, kl, noise),
                    "examples": examples(reached),
                }
                lines.append(cell)
    for cell in reversed(lines):
        if cell["method"] == failed:
            for key in ("training", "evaluation", "examples"):
                del cell[key]
            cell |= {"status": "failed", "error": "RuntimeError: out of memory <here>\nlast line"}
            break
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder

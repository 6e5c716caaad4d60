"""1 for a right sum, 0 for a wrong one, by reasoning-gym's own checker. For `--reward.remote_url reward.py`.

The answer is the first line of the response, for `bond select --answer reward.py` too; `--data.label_key label` hands
over the task's entry.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch

SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>")
_checker: Any = None


def checker() -> Any:
    """reasoning-gym's task, made once a process."""
    global _checker
    if _checker is None:
        import reasoning_gym

        _checker = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    return _checker


def answer_func(response: str) -> str:
    """The answer of a response, "" for none."""
    lines = SPECIAL_TOKEN.sub("", response).strip(" ").splitlines()
    return lines[0].strip() if lines else ""


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Score each query (prompt and response, decoded with special tokens).

    Returns:
        `rewards` and `scores`: float32 [len(queries)], 0 or 1. `extra_logs`: empty.
    """
    rewards = []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        answer = answer_func(query[len(prompt) :])
        # The checker also gives a little for answers that merely contain the right one: only all of it counts.
        rewards.append(float(checker().score_answer(answer, entry=json.loads(label)) == 1.0))
    values = torch.tensor(rewards, dtype=torch.float32)
    return {"rewards": values, "scores": values, "extra_logs": {}}

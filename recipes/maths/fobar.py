"""FOBAR's backward share of a sum, as a reward for `bond select --selector weighted`: see docs/select.md.

The question is the last line of the prompt, after the examples, and the answer the first line of the response. For
`BOND_FOBAR_ALPHA=0`; the server is asked as in `bond_plugin.rewards.fobar`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bond_plugin.rewards import fobar

sys.path.insert(0, str(Path(__file__).parent))

from reward import answer_func


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Score each query (prompt and response, decoded with special tokens); labels are not used.

    Returns:
        As :func:`bond_plugin.rewards.fobar.reward_func`.
    """
    questions = [prompt.splitlines()[-1] for prompt in prompts]
    answers = [answer_func(query[len(prompt) :]) for query, prompt in zip(queries, prompts, strict=True)]
    asked = [f"{question} {answer}" for question, answer in zip(questions, answers, strict=True)]
    return fobar.reward_func(asked, questions, labels)

"""Errors in the user's reward stop the run.

The host logs an exception of the reward function and goes on with no reward. Here it is raised again with
its traceback, from the sample that met it.
"""

from __future__ import annotations

import contextvars
import math
from typing import Any

from bond_plugin.words import shorten

_failure: contextvars.ContextVar[list[BaseException] | None] = contextvars.ContextVar("failure", default=None)


class RewardError(RuntimeError):
    """The reward of a sample could not be computed, or is not a finite number."""


async def fetch(original: Any, self: Any, queries_list: list, prompts_list: list, labels_list: list) -> Any:
    """Note the exception for :func:`execute` before the host swallows it."""
    try:
        return await original(self, queries_list, prompts_list, labels_list)
    except Exception as error:
        noted = _failure.get()
        if noted is not None:
            noted.append(error)
        raise


async def execute(original: Any, self: Any, prompt: str, *args: Any, **kwargs: Any) -> Any:
    """One sample: generate, score; raise what the reward function raised."""
    noted: list[BaseException] = []
    token = _failure.set(noted)
    try:
        output = await original(self, prompt, *args, **kwargs)
    finally:
        _failure.reset(token)
    if noted:
        raise RewardError(
            f"the reward ({', '.join(self.reward_endpoints)}) failed on the prompt {shorten(prompt)}: {noted[0]!r}"
        ) from noted[0]
    if self.reward_endpoints and output.get("reward") is None:
        raise RewardError(
            f"the reward ({', '.join(self.reward_endpoints)}) returned no 'rewards' for the prompt {shorten(prompt)}"
        )
    return output


def finite(value: float, prompt: str) -> float:
    """``value``, if it is a number that can be put in an order.

    Raises:
        RewardError: NaN or infinite; the prompt is named.
    """
    if not math.isfinite(value):
        raise RewardError(f"the reward is {value} for the prompt {shorten(prompt)}")
    return value

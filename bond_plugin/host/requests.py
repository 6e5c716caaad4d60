"""Many samples in one call to an engine.

The host calls an engine once a prompt, which takes Ray about as long as a small model takes to answer. Our
samples have a seed each, so they would take a call each; :class:`Requests` carries many of them in one.
"""

from __future__ import annotations

import asyncio
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from bond_plugin.host import rewards


@dataclass(frozen=True)
class Requests:
    """What one call asks for, in the place of the host's prompt.

    Attributes:
        prompts: [requests].
        labels: [requests], what the reward function is given with each prompt.
        seeds: [requests], of the random numbers of each sample.
    """

    prompts: list[str]
    labels: list[Any]
    seeds: list[int]


async def execute(original: Any, self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's single-turn executor: one sample for a prompt, a list of them for :class:`Requests`.

    Raises:
        RewardError: see :func:`bond_plugin.host.rewards.execute`; the first of a sample ends the call.
    """
    if not isinstance(prompt, Requests):
        return await rewards.execute(original, self, prompt, *args, **kwargs)
    samples = []
    for text, label, seed in zip(prompt.prompts, prompt.labels, prompt.seeds, strict=True):
        params = deepcopy(kwargs["sampling_params"])
        params.seed = seed
        options = kwargs | {"label": label, "sampling_params": params}
        samples.append(rewards.execute(original, self, text, *args, **options))
    return await asyncio.gather(*samples)

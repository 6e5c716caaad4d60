"""In the engines: one sample or many in a call, and the user's reward, which is one finite number or stops the run.

The host calls an engine once a prompt, which takes Ray about as long as a small model takes to answer. Our
samples have a seed each, so they would take a call each; :class:`Requests` carries many of them in one.

The host logs an exception of the reward function and goes on with no reward; a ``StopIteration`` or ``SystemExit``
would hang its event loop. Here each is raised again, with its traceback, from the sample that met it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch

from bond_plugin.host import TIMEOUT_VARIABLE
from bond_plugin.words import shorten

#: Prefix of the metrics that a reward gives beside itself, so that they take nobody's name.
EXTRA = "extra_logs/"

_SAY_EVERY = 60.0  # seconds
#: Of the sample that is scored: the exception, and what the host said last of a server.
_failure: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("failure", default=None)
#: What the host has logged while it asked a server: why that failed, which it does not raise.
_heard: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("heard", default=None)
_said = 0.0


class RewardError(RuntimeError):
    """The reward of a sample could not be computed, or is not a finite number."""


async def fetch(original: Any, self: Any, queries_list: list, prompts_list: list, labels_list: list) -> Any:
    """Rewards by the host's own call of a function or a server, in their final form: see :func:`checked`.

    Raises:
        RewardError: it took longer than ``--reward.timeout``, raised what would end more than this call, or gave what
            is no reward.
        Exception: what the function raised; a server's failure.
    """
    if self.reward_func is not None and not isinstance(self.reward_func, _Guarded):
        self.reward_func = _Guarded(self.reward_func)
    _listen()
    heard: list[str] = []
    _heard.set(heard)
    try:
        found = await _within_time(original(self, queries_list, prompts_list, labels_list), prompts_list)
        return [checked(answer) for answer in found]
    except Exception as error:
        noted = _failure.get()
        if noted is not None:
            noted += [error, *heard[-1:]]  # for `execute`, before the host swallows it
        raise


class _Guarded:
    """A reward function of which every exception can pass through a future."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        try:
            return self._function(*args)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                raise
            raise RewardError(f"it raised {error!r}") from error


async def _within_time(rewards: Any, prompts: list[str]) -> Any:
    """Wait for rewards; say once a minute that this process waits, for all that it waits for."""
    global _said
    limit = float(os.environ.get(TIMEOUT_VARIABLE, math.inf))
    started = time.monotonic()
    task = asyncio.ensure_future(rewards)
    while True:
        left = started + limit - time.monotonic()
        done, _ = await asyncio.wait({task}, timeout=max(0.0, min(_SAY_EVERY, left)))
        if done:
            return task.result()
        now = time.monotonic()
        if now >= started + limit:
            raise RewardError(f"it took longer than --reward.timeout {limit:g} s")
        if now - _said >= _SAY_EVERY:
            _said = now
            print(
                f"bond: waiting for the reward of the prompt {shorten(prompts[0])} for {now - started:.0f} s "
                "(--reward.timeout would end the run)",
                flush=True,
            )


@functools.cache  # once a process
def _listen() -> None:
    """Hear what the host's executor logs, and let it read what servers send."""
    from aiohttp import ClientResponse

    logging.getLogger("openrlhf.utils.agent").addFilter(_hear)
    # Servers send JSON under other content types, too.
    ClientResponse.json = functools.partialmethod(ClientResponse.json, content_type=None)


def _hear(record: logging.LogRecord) -> bool:
    heard = _heard.get()
    if heard is not None:
        heard.append(record.getMessage())
    return True


class Requests(list[tuple[str, Any, int]]):
    """What one call asks for, in the place of the host's prompt: of each sample prompt, label and seed."""


async def execute(original: Any, self: Any, prompt: str | Requests, *args: Any, **kwargs: Any) -> Any:
    """The host's single-turn executor: one sample for a prompt, generated and scored; of :class:`Requests` a list.

    Raises:
        RewardError: what the reward function raised; the first of a sample ends the call.
    """
    if isinstance(prompt, Requests):
        samples = []
        for text, label, seed in prompt:
            params = deepcopy(kwargs["sampling_params"])
            params.seed = seed
            options = kwargs | {"label": label, "sampling_params": params}
            samples.append(execute(original, self, text, *args, **options))
        return await asyncio.gather(*samples)
    noted: list[BaseException] = []
    token = _failure.set(noted)
    try:
        output = await original(self, prompt, *args, **kwargs)
    finally:
        _failure.reset(token)
    name = ", ".join(self.reward_endpoints)
    if noted:
        cause, *last = noted
        raise failed(name, prompt, cause, f" ({last[0]})" if last else "") from cause
    if self.reward_endpoints and output.get("reward") is None:
        raise RewardError(f"the reward ({name}) returned no 'rewards' for the prompt {shorten(prompt)}")
    return output


def failed(name: str, prompt: str, cause: BaseException, answer: str = "") -> RewardError:
    """The error of a prompt: which reward, and what it raised."""
    said = str(cause) if isinstance(cause, RewardError) else repr(cause)
    return RewardError(f"the reward ({name}) failed on the prompt {shorten(prompt)}: {said}{answer}")


def checked(answer: Any) -> dict[str, Any]:
    """What a reward gives for one query, in its final form: ``rewards``, ``scores`` and ``extra_logs``.

    Raises:
        RewardError: it is something else.
    """
    if not isinstance(answer, Mapping) or answer.get("rewards") is None:
        raise RewardError(
            "for each query it must give a dictionary with one number under 'rewards' (and may give 'scores' and "
            f"'extra_logs'), it gave {shorten(answer)}"
        )
    return {"rewards": number(answer["rewards"], "rewards"), **_beside(answer)}


def settle(original: Any, self: Any, response: dict[str, Any], **kwargs: Any) -> Any:
    """Before the host makes an experience of a response, whoever made it, its reward gets its final form.

    Raises:
        RewardError: reward, score or an entry of the logs is not one finite number; the prompt is named.
    """
    try:
        settled = _beside(response)
        if response.get("reward") is not None:
            settled["reward"] = number(response["reward"], "reward")
    except RewardError as error:
        raise RewardError(f"{error}, for the prompt {shorten(response['prompt'])}") from None
    logs = {f"{EXTRA}{name}": value for name, value in settled["extra_logs"].items()}
    return original(self, response | settled | {"extra_logs": logs}, **kwargs)


def _beside(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Score and logs of an answer, each one number."""
    logs, score = answer.get("extra_logs") or {}, answer.get("scores")
    if not isinstance(logs, Mapping):
        raise RewardError(f"'extra_logs' must be a dictionary of numbers, it is {shorten(logs)}")
    return {
        "scores": None if score is None else number(score, "scores"),
        "extra_logs": {str(name): number(value, f"extra_logs['{name}']") for name, value in logs.items()},
    }


def number(value: Any, what: str) -> float:
    """One finite float32, of a number, or of a tensor, an array or a list of one.

    Raises:
        RewardError: it is none.
    """
    try:
        if "complex" in str(getattr(value, "dtype", "")):  # whose other half would be dropped
            raise TypeError
        (found,) = torch.as_tensor(value, dtype=torch.float32).flatten().tolist()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RewardError(f"{what} must be one finite number for a query, and is {shorten(value)}")
    return found


def finite(value: float, prompt: str) -> float:
    """``value``, if it is a number that can be put in an order.

    Raises:
        RewardError: NaN or infinite; the prompt is named.
    """
    if not math.isfinite(value):
        raise RewardError(f"the reward is {value} for the prompt {shorten(prompt)}")
    return value

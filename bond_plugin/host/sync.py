"""Weights to the rollout engines, many tensors at a time.

For each tensor the host makes a call of Ray and one of the engine, sends it and waits until it is loaded. Here its
loop runs as it is, gathering included; what it hands over is collected, and goes out ``--bond.sync_mb`` at a time:
one call, one broadcast, one loading (an engine takes but one type), while the next are collected. With CUDA IPC
(``--train.colocate_all``) and with Ray's collectives the host's own way is taken.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import ray
import torch

from bond_plugin.host import cpu, on_cpu, plan


class Parcel:
    """What stands in the place of engines and process group while the host's loop runs on rank 0.

    Args:
        engines, group: the real ones.
        capacity: bytes that are sent at a time; a larger tensor goes alone.

    Attributes:
        engines: for the host to call, all with the same.
    """

    def __init__(self, engines: list[Any], group: Any, capacity: int) -> None:
        self._real, self._group, self._capacity = engines, group, capacity
        self.engines = [_Engine(engine, self._note) for engine in engines]
        self._done = ray.put(None)  # of the host's calls, which have nothing to wait for
        self._loading: list[Any] = []  # the engines' calls for what was sent last
        self._noted: tuple[str, bool] = ("", False)
        self._held: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self._end = 0  # of what is held, in numbers
        self._buffer: torch.Tensor | None = None

    def _note(self, name: str, dtype: Any, shape: Any, empty_cache: bool = False) -> Any:
        self._noted = (name, empty_cache)
        return self._done

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """In the group's place: keep the tensor that was noted, and send what is held before there is too much."""
        name, last = self._noted
        data, capacity = tensor.detach().flatten(), self._capacity // tensor.itemsize
        if self._held and self._end + len(data) > capacity:
            self._send(self._buffer, stream, last=False)
        start, self._end = self._end, self._end + len(data)
        self._held.append((name, tensor.dtype, tuple(tensor.shape)))
        if len(data) > capacity:
            self._send(data, stream, last)
            return
        if self._buffer is None:
            self._buffer = data.new_empty(capacity)
        # Copied: under ZeRO-3 the numbers are there only until the host goes on to the next parameter.
        self._buffer[start : self._end] = data
        if last:
            self._send(self._buffer, stream, last)

    def _send(self, data: torch.Tensor, stream: Any, last: bool) -> None:
        names, dtypes, shapes = map(list, zip(*self._held, strict=True))
        ray.get(self._loading)  # one parcel, while the next was packed
        self._loading = [
            engine.update_weight.remote(names, dtype=dtypes, shape=shapes, empty_cache=last) for engine in self._real
        ]
        self._group.broadcast(data[: self._end], src=0, stream=stream)
        self._held, self._end = [], 0
        if last:
            ray.get(self._loading)


class _Engine:
    """A rollout engine to which no weights go but through a :class:`Parcel`."""

    def __init__(self, engine: Any, note: Any) -> None:
        self._engine = engine
        self.update_weight = SimpleNamespace(remote=note)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def broadcast_to_vllm(original: Any, self: Any) -> None:
    """A training worker sends the weights that are in place."""
    group, engines = getattr(self, "_model_update_group", None), self.vllm_engines
    capacity = plan.in_bytes(self.args, "sync_mb")
    if not capacity or group is None or isinstance(group, str) or self.use_cuda_ipc:
        original(self)
        return
    sender, parcel = copy.copy(self), Parcel(engines, group, capacity)
    sender._model_update_group, sender.vllm_engines = parcel, parcel.engines
    original(sender)


def update_weight(original: Any, self: Any, name: Any, dtype: Any, shape: Any, empty_cache: bool = False) -> None:
    """vLLM's worker: receive a list of tensors, or one, and load."""
    if isinstance(name, str):
        if not on_cpu():
            original(self, name, dtype, shape, empty_cache)
            return
        name, dtype, shape = [name], [dtype], [shape]
    for each, kind in zip(name, dtype, strict=True):
        if kind != self.model_config.dtype:
            raise ValueError(f"{each} arrives as {kind}, but the engine holds {self.model_config.dtype}")
    sizes = [math.prod(each) for each in shape]
    data = torch.empty(sum(sizes), dtype=self.model_config.dtype, device="cpu" if on_cpu() else "cuda")
    self._model_update_group.broadcast(data, src=0, stream=torch.cuda.current_stream())
    parts = zip(name, data.split(sizes), shape, strict=True)
    self.model_runner.model.load_weights(weights=[(n, part.view(tuple(s))) for n, part, s in parts])
    cpu.updates += 1

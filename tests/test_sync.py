"""Weights in parcels: what is loaded is what was sent, to the bit, and both sides agree on how many bytes travel.

That the engines of a run then hold the policy's weights is seen in the runs: ``bond/engine_gap_policy``.
"""

from __future__ import annotations

import os

os.environ.setdefault("BOND_DEVICE", "cpu")

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bond_plugin.host import sync

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=12)


class Wire:
    """Both ends of a process group, and an engine whose worker receives what is on the wire."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.calls: list[tuple[list[str], bool]] = []
        self.sent: torch.Tensor | None = None
        self.worker = SimpleNamespace(
            model_config=SimpleNamespace(dtype=dtype),
            _model_update_group=SimpleNamespace(broadcast=self.receive),
            model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=self.load)),
        )
        self.update_weight = SimpleNamespace(remote=self.call)

    def call(self, *what: Any, empty_cache: bool, **more: Any) -> Any:
        self.asked = (what, more)
        self.calls.append((what[0], empty_cache))

    def broadcast(self, data: torch.Tensor, src: int, stream: Any = None) -> None:
        self.sent = data.clone()
        what, more = self.asked
        sync.update_weight(None, self.worker, *what, **more)

    def receive(self, data: torch.Tensor, src: int, stream: Any = None) -> None:
        data.copy_(self.sent)  # fails where the two disagree on the size

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded |= {name: tensor.clone() for name, tensor in weights}


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync.ray, "put", lambda value: value)
    monkeypatch.setattr(sync.ray, "get", lambda refs: refs)
    monkeypatch.setattr(sync.torch.cuda, "current_stream", lambda: None)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, capacity=st.integers(16, 4000), transposed=st.booleans())
def test_what_is_loaded_is_what_was_sent(
    dtype: str, shapes: list[list[int]], capacity: int, transposed: bool
) -> None:
    tensors = {f"layer.{i}": torch.randn(shape).to(DTYPES[dtype]) for i, shape in enumerate(shapes)}
    if transposed:
        tensors = {name: tensor.permute(tuple(reversed(range(tensor.dim())))) for name, tensor in tensors.items()}
    wire = Wire(DTYPES[dtype])
    parcel = sync.Parcel([wire], wire, capacity)
    (engine,) = parcel.engines
    assert engine.calls is wire.calls  # the rest of an engine is the engine's
    for i, (name, tensor) in enumerate(tensors.items(), start=1):
        engine.update_weight.remote(name, dtype=tensor.dtype, shape=tensor.shape, empty_cache=i == len(tensors))
        parcel.broadcast(tensor, src=0, stream=None)
    assert list(wire.loaded) == list(tensors)
    assert all(wire.loaded[name].equal(tensor) for name, tensor in tensors.items())
    assert [last for _, last in wire.calls] == [False] * (len(wire.calls) - 1) + [True]
    for names, _ in wire.calls:
        assert len(names) == 1 or sum(tensors[name].nbytes for name in names) <= capacity
    # No two parcels in a row would have been one.
    for (one, _), (two, _) in zip(wire.calls, wire.calls[1:], strict=False):
        numbers = sum(tensors[name].numel() for name in [*one, two[0]])
        assert numbers > capacity // DTYPES[dtype].itemsize


def test_another_type_than_the_engines_is_named() -> None:
    wire = Wire(torch.float32)
    with pytest.raises(ValueError, match=r"head arrives as torch\.bfloat16, but the engine holds torch\.float32"):
        sync.update_weight(None, wire.worker, ["body", "head"], [torch.float32, torch.bfloat16], [[2], [2]])

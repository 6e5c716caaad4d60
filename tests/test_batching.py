"""How rows are put into batches: packed samples on CPU, and dynamic batches under real DeepSpeed."""

from __future__ import annotations

import json

import pytest
from conftest import Tiny
from test_distributed import launch


@pytest.fixture(scope="module")
def packing(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    path = tmp_path_factory.mktemp("packing") / "out.json"
    launch("packing.py", 1, tiny.model, path)
    return json.loads(path.read_text())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["policy sdpa", "policy eager", "reward sdpa", "critic sdpa"])
def test_packed_rows_are_computed_as_padded_ones(packing: dict, model: str, dtype: str) -> None:
    """The host's own models: log-probabilities and entropy, or values, and the gradient of all parameters."""
    found = packing[f"{model} {dtype}"]
    print(found)
    assert set(found) == ({"log_probs", "entropy", "gradient"} if "policy" in model else {"values", "gradient"})
    assert max(found.values()) < (1e-5 if dtype == "fp32" else 2e-2)

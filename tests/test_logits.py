"""Log-probabilities from the logits of response tokens alone: the host's own numbers."""

from __future__ import annotations

import json

import pytest
from conftest import Tiny
from test_distributed import launch


@pytest.fixture(scope="module")
def compared(tiny: Tiny, forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("logits") / "out.json"
    launch("logits.py", 1, tiny.model, out, forks=forks)
    return json.loads(out.read_text())


@pytest.mark.parametrize("pieces", ["one piece", "pieces"])
@pytest.mark.parametrize("entropy", ["", " entropy"])
@pytest.mark.parametrize("rows", ["", " packed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_numbers_and_gradients_are_the_hosts(
    compared: dict, dtype: str, rows: str, entropy: str, pieces: str
) -> None:
    found = compared[f"{dtype}{rows}{entropy}, {pieces}"]
    assert found.pop("outputs") < 1, "the host's way was taken"
    assert set(found) == {"log_probs", "scored", "gradient", *entropy.split()}
    # In 16 bits the gradient of what is below the output layer is rounded after other sums than the host's.
    assert found.pop("gradient") < (1e-5 if dtype == "fp32" else 1e-2)
    assert max(found.values()) < (1e-5 if dtype == "fp32" else 1e-2)


def test_a_model_that_caps_its_logits_goes_the_hosts_way(compared: dict) -> None:
    assert set(compared["soft cap"].values()) == {0.0}


@pytest.mark.parametrize("rows", ["", " packed"])
def test_a_loss_on_logits_beside_a_teachers(compared: dict, rows: str) -> None:
    """The same from hidden states, in pieces, as from both models' logits."""
    found = compared[f"taught{rows}"]
    assert found.pop("of") > 0.05
    assert max(found.values()) < 1e-5

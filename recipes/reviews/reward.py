"""Sentiment reward for movie reviews, in the form OpenRLHF takes with `--reward.remote_url reward.py`.

The reward of a text is the logit of a TF-IDF + logistic-regression classifier (see prepare.py): above 0 the
review reads as positive, and it grows with every favourable phrase. It is calibrated on whole reviews, so a
policy that optimises it for long will find praise that no reader would believe; watch the KL.

The classifier is read from the folder named by the environment variable BOND_REVIEWS_DIR, `demo/` if it is
not set (relative to the directory training was started in).
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import torch

DIRECTORY_VARIABLE = "BOND_REVIEWS_DIR"
DEFAULT_DIRECTORY = "demo"
PREPARE = "recipes/reviews/prepare.py"
SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>|<(?:repo_name|reponame|file_sep|filename|gh_stars)>")

_loading = threading.Lock()
_classifier: Any = None


def load_classifier() -> Any:
    """The classifier, read once per process; safe to call from several threads.

    Raises:
        FileNotFoundError: it has not been made yet; the message names the command that makes it.
    """
    global _classifier
    with _loading:
        if _classifier is None:
            directory = os.environ.get(DIRECTORY_VARIABLE, DEFAULT_DIRECTORY)
            path = Path(directory) / "reward.joblib"
            if not path.is_file():
                raise FileNotFoundError(
                    f"no sentiment classifier at {path.absolute()}. Make it with "
                    f"`python {PREPARE} {directory}`, or point {DIRECTORY_VARIABLE} "
                    "at the folder that has reward.joblib"
                )
            import joblib

            _classifier = joblib.load(path)
    return _classifier


def strip_special_tokens(text: str) -> str:
    """The text without `<|im_end|>`, `<|endoftext|>` and the like, and without surrounding white space."""
    return SPECIAL_TOKEN.sub("", text).strip()


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Score each query (prompt and response, decoded with special tokens); prompts and labels are not used.

    Returns:
        `rewards`: logits, float32 [len(queries)], unbounded. `scores`: the same through the logistic
        function, in [0, 1]. `extra_logs`: empty.

    Raises:
        FileNotFoundError: see `load_classifier`.
    """
    logits = load_classifier().decision_function([strip_special_tokens(query) for query in queries])
    rewards = torch.tensor(logits, dtype=torch.float32)
    return {"rewards": rewards, "scores": torch.sigmoid(rewards), "extra_logs": {}}

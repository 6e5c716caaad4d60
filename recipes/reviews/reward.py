"""Sentiment reward for movie reviews, in the form OpenRLHF takes with `--reward.remote_url reward.py`.

The reward of a text is the logit of a TF-IDF + logistic-regression classifier (see prepare.py): above 0 the
review reads as positive, and it grows with every favourable phrase. It is calibrated on whole reviews, so a
policy that optimises it for long will find praise that no reader would believe; watch the KL.

The classifier is read from the folder named by the environment variable BOND_REVIEWS_DIR, `demo/` if it is
not set (relative to the directory training was started in).
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch

DIRECTORY_VARIABLE = "BOND_REVIEWS_DIR"
DEFAULT_DIRECTORY = "demo"
PREPARE = "recipes/reviews/prepare.py"
SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>|<(?:repo_name|reponame|file_sep|filename|gh_stars)>")

_loading = threading.Lock()
_logit: Logit | None = None


def load_logit() -> Logit:
    """The classifier's logit, read once per process; safe to call from several threads.

    Raises:
        FileNotFoundError: it has not been made yet; the message names the command that makes it.
    """
    global _logit
    with _loading:
        if _logit is None:
            directory = os.environ.get(DIRECTORY_VARIABLE, DEFAULT_DIRECTORY)
            path = Path(directory) / "reward.joblib"
            if not path.is_file():
                raise FileNotFoundError(
                    f"no sentiment classifier at {path.absolute()}. Make it with "
                    f"`python {PREPARE} {directory}`, or point {DIRECTORY_VARIABLE} "
                    "at the folder that has reward.joblib"
                )
            import joblib

            _logit = Logit(joblib.load(path))
    return _logit


def strip_special_tokens(text: str) -> str:
    """The text without `<|im_end|>`, `<|endoftext|>` and the like, and without surrounding white space."""
    return SPECIAL_TOKEN.sub("", text).strip()


class Logit:
    """The classifier's logit of one text, as `decision_function` gives it, some forty times as fast.

    Rewards are asked for one response at a time, and scikit-learn's way is made for thousands: checking and
    converting a single row takes 1.5 ms.

    Args:
        classifier: a pipeline of a TfidfVectorizer (`sublinear_tf`, `norm="l2"`) and a LogisticRegression.

    Raises:
        ValueError: it is another pipeline.
    """

    def __init__(self, classifier: Any) -> None:
        vectorizer, regression = (step for _, step in classifier.steps)
        if not (vectorizer.sublinear_tf and vectorizer.norm == "l2" and vectorizer.use_idf and not vectorizer.binary):
            raise ValueError("the classifier is not prepare.py's: make it again")
        self._words = vectorizer.build_analyzer()
        self._number = vectorizer.vocabulary_
        self._idf = vectorizer.idf_.tolist()
        self._weight = regression.coef_[0].tolist()
        self._bias = float(regression.intercept_[0])

    def __call__(self, text: str) -> float:
        total = square = 0.0
        for word, times in Counter(self._words(text)).items():
            number = self._number.get(word)
            if number is not None:
                tf_idf = (1.0 + math.log(times)) * self._idf[number]
                total += tf_idf * self._weight[number]
                square += tf_idf * tf_idf
        return self._bias + (total / math.sqrt(square) if square else 0.0)


def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
    """Score each query (prompt and response, decoded with special tokens); prompts and labels are not used.

    Returns:
        `rewards`: logits, float32 [len(queries)], unbounded. `scores`: the same through the logistic
        function, in [0, 1]. `extra_logs`: empty.

    Raises:
        FileNotFoundError, ValueError: see `load_logit` and `Logit`.
    """
    logit = load_logit()
    rewards = torch.tensor([logit(strip_special_tokens(query)) for query in queries], dtype=torch.float32)
    return {"rewards": rewards, "scores": torch.sigmoid(rewards), "extra_logs": {}}

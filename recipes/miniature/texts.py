"""What the miniature reads and writes: openings of movie reviews in one plain style, prompts, and pairs.

A model of two million parameters has no room for capital letters, HTML, brackets and two ways of spacing
punctuation. So all reviews are put into the style of the simplest ones first: lower case, five punctuation marks.
"""

from __future__ import annotations

import random
import re
import unicodedata

from reviews.corpus import Review

PROMPT_WORDS = (3, 6)  # a prompt is the first 3 to 6 words of a review, as in vBoN's sentiment task
LEAST_WORDS, MOST_WORDS = 15, 36  # of an opening; a sentence that is longer is cut off
LEAST_AFTER_PROMPT = 6  # words; a review shorter than this gives no prompt


def plain(text: str) -> str:
    """The text in lower case, of letters a to z, digits, hyphens, apostrophes and ``. , ! ? ; :``."""
    text = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    text = re.sub(r"[^a-z0-9.,!?;:' -]", " ", text)
    text = re.sub(r"(?<![a-z0-9])'|'(?![a-z0-9])", " ", text)  # quotation marks, not apostrophes
    text = re.sub(r"-{2,}|(?<![a-z0-9])-|-(?![a-z0-9])", " - ", text)  # dashes, not hyphens
    text = re.sub(r"\s*([.,!?;:])[\s.,!?;:]*", r"\1 ", text)
    return " ".join(text.split()).lstrip(".,!?;:- ")


def opening(text: str) -> tuple[str, bool]:
    """The first whole sentences in plain style, until they have LEAST_WORDS words; whether they end by MOST_WORDS."""
    words: list[str] = []
    start = plain(" ".join(text.split(" ")[: 2 * MOST_WORDS]))
    for sentence in re.split(r"(?<=[.!?]) ", start):
        words += sentence.split(" ")
        if len(words) >= LEAST_WORDS:
            break
    return " ".join(words[:MOST_WORDS]), len(words) <= MOST_WORDS


def prompt_of(review: Review) -> str | None:
    """The first words of a review, or None if little is left of its opening after them."""
    words = opening(review.text)[0].split(" ")
    count = random.Random(review.text).randint(*PROMPT_WORDS)  # the same for the same review
    return " ".join(words[:count]) if len(words) >= count + LEAST_AFTER_PROMPT else None


def lesson(text: str, eos: str) -> str:
    """What the policy learns from a review: its opening, with ``eos`` unless it was cut off."""
    start, whole = opening(text)
    return start + eos if whole else start


def pairs(reviews: list[Review], seed: int) -> list[dict[str, str]]:
    """Openings of a positive and a negative review of the same collection each, drawn without replacement."""
    made = []
    rng = random.Random(seed)
    for source in sorted({review.source for review in reviews}):
        chosen, rejected = (
            [opening(review.text)[0] for review in reviews if (review.source, review.label) == (source, label)]
            for label in (1, 0)
        )
        rng.shuffle(chosen)
        rng.shuffle(rejected)
        made += [{"chosen": good, "rejected": bad} for good, bad in zip(chosen, rejected, strict=False)]
    rng.shuffle(made)
    return made

"""Sums whose answers a program checks, for a model that reads one character at a time."""

from __future__ import annotations

import json
import random
from typing import Any

CHARACTERS = "0123456789+-="
TERMS = (2,)  # 12+7= or 12-40=
LARGEST = 99  # of a term
ANSWER_TOKENS = 5  # a sign, three digits, EOS


def exercises(count: int, seed: int, known: set[str] = frozenset()) -> list[dict[str, Any]]:
    """``count`` different sums that are not ``known``: ``input``, ``output`` and ``label``.

    The label is an entry of reasoning-gym's chain_sum, whose checker recipes/maths/reward.py calls. Raises ValueError
    if there are not so many sums.
    """
    sign_and_size = 2 * LARGEST + 1
    there_are = sum((LARGEST + 1) * sign_and_size ** (terms - 1) for terms in TERMS)
    if count + len(known) > there_are:
        raise ValueError(
            f"{count + len(known):,} different sums are asked for, but there are only {there_are:,}: give a smaller "
            "--train or --heldout"
        )
    rng = random.Random(seed)
    made: dict[str, dict[str, Any]] = {}
    while len(made) < count:
        terms = [rng.choice((-1, 1)) * rng.randint(0, LARGEST) for _ in range(rng.choice(TERMS))]
        terms[0] = abs(terms[0])
        expression = "".join(f"{term:+}" for term in terms).removeprefix("+")
        asked = f"{expression}="
        if asked in known or asked in made:
            continue
        answer = str(sum(terms))
        label = {"question": asked, "answer": answer, "metadata": {"expression": expression}}
        made[asked] = {"input": asked, "output": answer, "label": json.dumps(label)}
    return list(made.values())

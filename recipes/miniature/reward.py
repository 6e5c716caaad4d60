"""The reward of recipes/reviews (the logit of a sentiment classifier), with the classifier in `mini/`.

Another folder: the environment variable BOND_REVIEWS_DIR.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("reviews_reward", Path(__file__).parents[1] / "reviews" / "reward.py")
_reviews = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_reviews)
_reviews.DEFAULT_DIRECTORY = "mini"
_reviews.PREPARE = "recipes/miniature/prepare.py"

reward_func = _reviews.reward_func

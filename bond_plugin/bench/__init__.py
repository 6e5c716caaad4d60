"""``bond bench``: a matrix of training runs, measured on the same held-out prompts, and the report about it."""

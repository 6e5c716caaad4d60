"""``bond bench``: algorithms compared on one task, by reward against KL and win rate against KL.

``matrix``: what is run, from a YAML file; ``runner``: real training runs, resumable, several at once; ``measure``: a
policy on held-out prompts, in a process of its own; ``results``, ``summary``, ``figures`` and ``report``: from the
files that it leaves to a page. ``two``: the same measuring for two models, the table of ``bond evaluate``.
"""

"""What is done with models beside the host's training, for ``bond cache``, ``evaluate``, ``select`` and ``bench``.

``prompts``: by the host's own dataset, so that templates are those of training; ``engine``: samples from vLLM;
``scoring``: rewards by the host's own calls; ``likelihood``: log-probabilities, KL and entropy; ``measure``: all
numbers of a policy on held-out prompts; ``fingerprints``: which model or file it was; ``reward_cache`` and
``make_cache``: the file of ``bond cache``, and how it is made and checked; ``columns``: responses and rewards that
the data has already; ``selecting``: the file of ``bond select``.
"""

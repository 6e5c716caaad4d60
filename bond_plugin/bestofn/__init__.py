"""The mathematics of Best-of-N distillation. Imports torch and nothing of the host.

``distribution``: quantiles and the Best-of-N distribution; ``targets``: that and others of its kind; ``pooled``:
these of another distribution, each sample compared with all others of its prompt; ``baselines``: what takes noise
from gradients; ``divergences``: of whole distributions; ``estimates``: Best-of-N from samples; ``selectors``: one of
N samples; ``limits``: the best that any policy can do at a given KL, and how near to it a method comes.
"""

"""The mathematics of Best-of-N distillation. Imports torch and nothing of the host.

``distribution``: quantiles and the Best-of-N distribution; ``rewards``: what turns it into policy gradients;
``baselines``: what takes noise from these; ``estimates``: Best-of-N from samples; ``selectors``: one of N samples;
``pooled``: Best-of-N of another distribution, each sample compared with all others of its prompt;
``limits``: the best that any policy can do at a given KL, and how near to it a method comes.
"""

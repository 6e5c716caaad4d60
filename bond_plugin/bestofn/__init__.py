"""The mathematics of Best-of-N distillation. Imports torch and nothing of the host.

``distribution``: quantiles and the Best-of-N distribution; ``rewards``: what turns it into policy gradients;
``divergences``: forward, backward and Jeffreys, with gradients; ``estimates``: Best-of-N from samples.
"""

from bond_plugin.bestofn.distribution import (
    bon_kl,
    bon_kl_bound,
    bon_log_probs,
    level_probabilities,
    log_bon_ratio,
    quantiles,
    tied_log_bon_ratio,
)
from bond_plugin.bestofn.divergences import (
    Divergence,
    backward_kl,
    forward_kl,
    jeffreys,
    leave_one_out_mean,
)
from bond_plugin.bestofn.estimates import bootstrap_interval, expected_max, pass_at_n, win_rate
from bond_plugin.bestofn.rewards import bond_reward, jbond_reward, strict_ranks, vbon_reward

__all__ = [
    "Divergence",
    "backward_kl",
    "bon_kl",
    "bon_kl_bound",
    "bon_log_probs",
    "bond_reward",
    "bootstrap_interval",
    "expected_max",
    "forward_kl",
    "jbond_reward",
    "jeffreys",
    "leave_one_out_mean",
    "level_probabilities",
    "log_bon_ratio",
    "pass_at_n",
    "quantiles",
    "strict_ranks",
    "tied_log_bon_ratio",
    "vbon_reward",
    "win_rate",
]

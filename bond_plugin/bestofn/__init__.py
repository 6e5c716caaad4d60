"""The mathematics of Best-of-N distillation. Imports torch and nothing of the host.

``distribution``: quantiles and the Best-of-N distribution; ``rewards``: what turns it into policy gradients;
``divergences``: forward, backward and Jeffreys, with gradients; ``estimates``: Best-of-N from samples;
``pooled``: Best-of-N of another distribution, each sample compared with all others of its prompt;
``limits``: the best that any policy can do at a given KL, and how near to it a method comes.
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
from bond_plugin.bestofn.estimates import expected_max, pass_at_n, win_rate
from bond_plugin.bestofn.limits import (
    BestOfNCurve,
    Front,
    best_of_n_curve,
    bon_kl_from_samples,
    bon_win_rate,
    pareto_front,
    reward_front,
    win_rate_front,
)
from bond_plugin.bestofn.pooled import (
    effective_sample_size,
    harmonic_log_quantile,
    harmonic_log_quantile_among,
    mixture_weights,
    pooled_tilt,
)
from bond_plugin.bestofn.rewards import bond_reward, jbond_reward, strict_ranks, vbon_reward

__all__ = [
    "BestOfNCurve",
    "Divergence",
    "Front",
    "backward_kl",
    "best_of_n_curve",
    "bon_kl",
    "bon_kl_bound",
    "bon_kl_from_samples",
    "bon_log_probs",
    "bon_win_rate",
    "bond_reward",
    "effective_sample_size",
    "expected_max",
    "forward_kl",
    "harmonic_log_quantile",
    "harmonic_log_quantile_among",
    "jbond_reward",
    "jeffreys",
    "leave_one_out_mean",
    "level_probabilities",
    "log_bon_ratio",
    "mixture_weights",
    "pareto_front",
    "pass_at_n",
    "pooled_tilt",
    "quantiles",
    "reward_front",
    "strict_ranks",
    "tied_log_bon_ratio",
    "vbon_reward",
    "win_rate",
    "win_rate_front",
]

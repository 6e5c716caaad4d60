"""MaxRL: rewards 0 and 1, and the log of the success rate instead of the success rate itself. arXiv 2602.02710.

    A_i = (r_i - R) / R,   R = the mean of the prompt's n rewards;   0 where R = 0

so that a prompt counts the more the seldomer it is solved. With p = P(r = 1), and c = n R right ones among n samples,
the first part is the mean of grad log pi over the right ones, which has the expectation grad log p given c > 0:

    E[1{c > 0} / c  sum r_i grad log pi_i]   =  (1 - (1 - p)^n) grad log p  =  sum_{j=1..n} grad pass@j / j

with pass@j = 1 - (1 - p)^j: the theorem of the paper, the series of log p, cut at n. The second part, the mean of all
grad log pi, is a control variate of expectation zero only if it is taken off at c = 0 as well, where it leaves out
E[1{c = 0} (1 / n) sum grad log pi_i] = -(1 - p)^(n-1) grad p. So these advantages have the gradient of the series cut
at n - 1, exactly:

    E[(1 / n) sum A_i grad log pi_i]  =  grad of  sum_{j=1..n-1} pass@j / j  =  grad of  -sum_{j=1..n-1} (1 - p)^j / j

n = 2 is REINFORCE. We keep the zero: the term would push a prompt's n failures away at its full noise.

``--bond.gamma_ref`` adds -gamma_ref KL(pi || pi_ref) to the objective, which is ours; 0 is the paper.
"""

from __future__ import annotations

import torch

from bond_plugin.algorithms.base import Algorithm, DataError, Needs
from bond_plugin.algorithms.batch import AdvantageInputs, AdvantageOutputs
from bond_plugin.algorithms.pooled import PulledConfig, pulled


class MaxRL(Algorithm):
    Config = PulledConfig
    config: PulledConfig

    def needs(self) -> Needs:
        return Needs(least=2, log_probs=self.config.log_probs)

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        """As above. Raises DataError for a reward that is neither 0 nor 1."""
        rewards = batch.rewards
        other = rewards[(rewards != 0) & (rewards != 1)]
        if len(other):
            raise DataError(
                f"rewards must be 0 or 1 for maxrl, got {other[0].item():g} (and {len(other) - 1} more of "
                f"{rewards.numel()}): give --reward.remote_url a threshold (bond lab: --reward tied), and drop "
                "--reward.overlong_buffer_len and --reward.stop_properly_penalty_coef, which change rewards; for "
                "rewards of any size there is --algo.advantage.estimator pkpo"
            )
        mean = rewards.mean(dim=-1, keepdim=True)
        advantages = torch.where(mean > 0, (rewards - mean) / mean, 0.0)
        return AdvantageOutputs(
            advantages=pulled(advantages, batch, self.config.gamma_ref),
            metrics={
                "bond/pass_at_n": (mean > 0).double().mean().item(),
                "bond/no_signal": ((mean == 0) | (mean == 1)).double().mean().item(),
            },
        )

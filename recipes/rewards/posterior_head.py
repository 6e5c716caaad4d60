"""The reward `posterior_head`, mean - kappa std, for `--reward.remote_url`; its settings: docs/rewards.md."""

from bond_plugin.rewards.posterior_head import reward_func  # noqa: F401

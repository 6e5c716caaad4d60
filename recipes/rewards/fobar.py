"""The reward `fobar`, forward and backward reasoning, for `--reward.remote_url`; its settings: docs/rewards.md."""

from bond_plugin.rewards.fobar import reward_func  # noqa: F401

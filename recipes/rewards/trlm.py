"""The reward `trlm`, log P(query | response) per token, for `--reward.remote_url`; its settings: docs/rewards.md."""

from bond_plugin.rewards.trlm import reward_func  # noqa: F401

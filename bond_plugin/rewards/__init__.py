"""Rewards that come with the package, each a file for ``--reward.remote_url`` (see docs/rewards.md)."""

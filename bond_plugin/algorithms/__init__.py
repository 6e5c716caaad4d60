"""One file an algorithm, readable beside its paper, and the interface that all of them share."""

from bond_plugin.algorithms.base import (
    AdvantageInputs,
    AdvantageOutputs,
    Algorithm,
    Config,
    DataError,
    LossInputs,
    LossOutputs,
    Needs,
    RewardTransform,
    TransformConfig,
    TransformOutputs,
    flag,
)

__all__ = [
    "AdvantageInputs",
    "AdvantageOutputs",
    "Algorithm",
    "Config",
    "DataError",
    "LossInputs",
    "LossOutputs",
    "Needs",
    "RewardTransform",
    "TransformConfig",
    "TransformOutputs",
    "flag",
]

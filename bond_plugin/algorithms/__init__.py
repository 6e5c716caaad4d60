"""One file an algorithm, readable beside its paper, and the interface that all of them share."""

from bond_plugin.algorithms.base import (  # noqa: F401
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

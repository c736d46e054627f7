"""The learning-rate schedules of `transformers.get_scheduler`, each a plugin under its own name."""

from .schedules import (
    Constant,
    ConstantWithWarmup,
    Cosine,
    CosineWarmupWithMinLr,
    CosineWithMinLr,
    CosineWithRestarts,
    InverseSqrt,
    Linear,
    Polynomial,
    TransformersSchedule,
    WarmupStableDecay,
)

__all__ = [
    "Constant",
    "ConstantWithWarmup",
    "Cosine",
    "CosineWarmupWithMinLr",
    "CosineWithMinLr",
    "CosineWithRestarts",
    "InverseSqrt",
    "Linear",
    "Polynomial",
    "TransformersSchedule",
    "WarmupStableDecay",
]

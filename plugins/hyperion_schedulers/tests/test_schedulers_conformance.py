"""The conformance suite, two lines a schedule; three lines where a schedule is unlike the others by design."""

from __future__ import annotations

from typing import ClassVar

from hyperion_core.testing import SchedulerConformance


class TestLinear(SchedulerConformance):
    plugin = "linear"


class TestCosine(SchedulerConformance):
    plugin = "cosine"


class TestCosineWithRestarts(SchedulerConformance):
    plugin = "cosine_with_restarts"


class TestCosineWithMinLr(SchedulerConformance):
    plugin = "cosine_with_min_lr"
    options: ClassVar = {"min_lr_rate": 0.1}


class TestCosineWarmupWithMinLr(SchedulerConformance):
    plugin = "cosine_warmup_with_min_lr"
    options: ClassVar = {"min_lr": 1e-4}
    starts_at = 0.1


class TestPolynomial(SchedulerConformance):
    plugin = "polynomial"


class TestInverseSqrt(SchedulerConformance):
    plugin = "inverse_sqrt"


class TestConstantWithWarmup(SchedulerConformance):
    plugin = "constant_with_warmup"


class TestConstant(SchedulerConformance):
    plugin = "constant"
    warms_up = False


class TestWarmupStableDecay(SchedulerConformance):
    plugin = "warmup_stable_decay"


class TestQualifiedName(SchedulerConformance):
    plugin = "hyperion-schedulers:cosine"

# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest

from hf_vitreg.pretrain_recipe import MonitorOptions, PretrainRecipe
from hf_vitreg.training.collapse import LIMITS, CollapseWatch, TrainingCollapsed


HEALTHY = {
    "loss": 7.0,
    "feature_rank": 0.3,
    "target_entropy": 0.9,
    "teacher_entropy": 0.4,
    "ibot_teacher_entropy": 0.5,
}
COLLAPSED = {"feature_rank": 0.019, "target_entropy": 0.09, "teacher_entropy": 0.991, "ibot_teacher_entropy": 0.993}
OPTIONS = {
    "feature_rank": "min_feature_rank",
    "target_entropy": "min_target_entropy",
    "teacher_entropy": "max_teacher_entropy",
    "ibot_teacher_entropy": "max_teacher_entropy",
}


def test_a_healthy_run_hears_nothing():
    watch = CollapseWatch(MonitorOptions(on_collapse="stop"))
    assert watch.check(HEALTHY, step=3) == watch.check({}, step=5) == []
    at_the_limit = {"feature_rank": 0.02, "target_entropy": 0.1, "teacher_entropy": 0.99}
    assert watch.check(at_the_limit, step=7) == []


@pytest.mark.parametrize(("metric", "value"), COLLAPSED.items())
def test_a_collapse_is_named_once_until_it_recovers(metric, value):
    watch = CollapseWatch(MonitorOptions())
    (message,) = watch.check(HEALTHY | {metric: value}, step=11)
    limit = f"--{OPTIONS[metric]} {getattr(MonitorOptions(), OPTIONS[metric])}"
    assert all(part in message for part in (metric, f"{value:.3g}", limit, "step 11"))
    assert watch.check(HEALTHY | {metric: value}, step=12) == []
    assert watch.check({"loss": 7.0}, step=13) == []  # not measured is not recovered
    assert watch.check(HEALTHY | {metric: value}, step=14) == []
    assert watch.check(HEALTHY, step=15) == []
    assert len(watch.check(HEALTHY | {metric: value}, step=16)) == 1


def test_remedies_are_flags_that_there_are():
    flags = {word.strip(".,") for limit in LIMITS.values() for word in limit.remedy.split() if word.startswith("--")}
    assert len(flags) > 3 and {flag[2:] for flag in flags} <= set(PretrainRecipe.__dataclass_fields__)


@pytest.mark.parametrize("metric", ["loss", "koleo_loss", *COLLAPSED])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_always_told(metric, value):
    (message,) = CollapseWatch(MonitorOptions()).check({metric: value}, step=2)
    assert message.startswith(f"{metric} is {value} at step 2")


def test_a_run_that_is_to_stop_stops_at_the_first():
    watch = CollapseWatch(MonitorOptions(on_collapse="stop", min_feature_rank=0.5))
    with pytest.raises(
        TrainingCollapsed, match=r"feature_rank is 0\.3 at step 17, below --min_feature_rank 0\.5"
    ) as found:
        watch.check(HEALTHY, step=17)
    assert (found.value.metric, found.value.value, found.value.limit, found.value.step) == (
        "feature_rank",
        0.3,
        0.5,
        17,
    )


def test_a_run_may_collapse_in_peace():
    assert CollapseWatch(MonitorOptions(on_collapse="ignore")).check(COLLAPSED | {"loss": float("nan")}, step=1) == []

# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What registers changed is told as it is: a success only where artifacts went and CLS stayed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from planted import MEAN, NEURON, NUM_LAYERS, PLANTED_LAYER, STD, neuron, patchy_image, planted_encoder
from torch.nn.functional import cosine_similarity

from hf_vitreg.analysis.inspection import inspect
from hf_vitreg.analysis.sections import NOTHING
from hf_vitreg.features import VisionEncoder
from hf_vitreg.registers.effect import Effect, measure_effect
from hf_vitreg.registers.test_time import with_test_time_registers


IMAGES = [patchy_image(index)[0] for index in range(24)]


def wrapped(model, name) -> VisionEncoder:
    return VisionEncoder.wrap(model, name, MEAN, STD)


@torch.no_grad()
def silenced(model):
    """A copy whose neuron writes nothing."""
    model = copy.deepcopy(model)
    neuron(model)[1].weight[:, NEURON] = 0
    return model


@pytest.fixture(scope="module")
def before() -> VisionEncoder:
    return planted_encoder(500.0, num_registers=0)


@pytest.fixture(scope="module")
def cured(before) -> VisionEncoder:
    return wrapped(with_test_time_registers(before.model, {PLANTED_LAYER - 1: [NEURON]}), "cured")


@pytest.fixture(scope="module")
def cure(before, cured) -> Effect:
    return measure_effect(before, cured, IMAGES)


def test_a_cure_is_a_success_with_its_numbers(cure, before):
    assert cure.succeeded and cure.had_artifacts and cure.outliers_fell and cure.output_stayed
    first, second = cure.outlier_shares
    assert first == pytest.approx(36 / (24 * 24)) and second == 0 and cure.own_outlier_share == 0
    alone = inspect(before, IMAGES)
    assert cure.before.metrics == alone.metrics, "as hf-vitreg inspect has it"
    threshold = alone.metrics["verdict"]["threshold"]
    assert cure.after.metrics["settings"]["threshold"] == cure.after.metrics["verdict"]["threshold"] == threshold
    ratios = cure.norm_ratios
    assert ratios[0] > 10 and ratios[1] < 2
    shares = cure.attention_to_patches
    assert shares[0] == alone.metrics["attention"]["cls"][NUM_LAYERS - 1]["attention_to_patches"]
    assert 0 < shares[1] < shares[0] < 1, "a register has its part"


def test_cosines_are_of_cls_past_the_final_norm(cure, before, cured):
    pixel_values = before.preprocess(IMAGES)
    with torch.no_grad():
        first, second = (each.model(pixel_values).last_hidden_state[:, 0] for each in (before, cured))
    cosines = cosine_similarity(first.double(), second.double(), dim=-1)
    assert cure.cosine_mean == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert cure.cosine_min == pytest.approx(cosines.min().item(), abs=1e-6)
    assert cure.cosine_min < 1 and cure.output == "CLS"


def test_without_cls_it_is_the_mean_of_the_patches():
    settings = {"use_cls_token": False, "position_embedding_type": "patches", "pooler_type": "mean"}
    settings["classifier_layout"] = "pooled"
    before = planted_encoder(500.0, num_registers=0, **settings)
    after = wrapped(silenced(before.model), "silenced")
    effect = measure_effect(before, after, IMAGES, cls_tolerance=2.0)
    with torch.no_grad():
        pixel_values = before.preprocess(IMAGES)
        first, second = (each.model(pixel_values).patch_tokens.mean(dim=1) for each in (before, after))
    assert effect.cosine_mean == pytest.approx(cosine_similarity(first, second).mean().item(), abs=1e-5)
    assert effect.output == "the mean of the patches" and effect.succeeded
    assert effect.sentences()[-1].startswith("The mean of the patches before and after")


def test_the_same_model_is_no_success(before):
    effect = measure_effect(before, before, IMAGES)
    assert not effect.succeeded and effect.output_stayed and effect.cosine_mean == pytest.approx(1)
    share = effect.outlier_shares[0]
    assert effect.outlier_shares == (share, share) and effect.norm_ratios[0] == effect.norm_ratios[1]
    assert effect.sentences()[0] == (
        "No success: outliers went from 6.25 % to 6.25 % of the patches, where a fall by 50 % was asked for."
    )


def test_where_nothing_was_wrong_there_is_no_success():
    untouched = planted_encoder(1.0, num_registers=0)
    effect = measure_effect(untouched, untouched, IMAGES)
    assert not effect.succeeded
    assert effect.sentences()[0].startswith("No success: there were no artifacts to take away (")


@torch.no_grad()
def test_cls_that_moved_is_no_success(before):
    model = silenced(before.model)
    model.layernorm.bias += 2 * torch.randn_like(model.layernorm.bias)
    effect = measure_effect(before, wrapped(model, "moved"), IMAGES)
    assert effect.outliers_fell and not effect.output_stayed and not effect.succeeded
    assert (
        effect.sentences()[0].startswith("No success: CLS moved by 0.")
        and "tolerance is 0.1." in effect.sentences()[0]
    )
    # the same numbers, another limit
    assert measure_effect(before, wrapped(model, "moved"), IMAGES, cls_tolerance=1.9).succeeded


def faked(before: dict, after: dict, own: dict, **changes) -> Effect:
    def inspection(verdict):
        verdict = {"threshold": 10.0, "layer": 2, "side": "high", "has_artifacts": True, **verdict}
        norms = [{"layer": 1, "max": 9, "median": 9, "min": 9}, {"layer": 2, "max": 40, "median": 8, "min": 2}]
        images = {"num_images": 3, "height": 14, "width": 21, "sha256": "0123456789abcdef0123"}
        metrics = {"verdict": verdict, "norms": {"patch": norms}, "attention": None, "images": images}
        return SimpleNamespace(metrics={**metrics, "thresholds": {"high": {"mad": own}, "low": {"mad": own}}})

    settings = {"output": "CLS", "cosine_mean": 0.95, "cosine_min": 0.9, "cls_tolerance": 0.1, "min_fall": 0.5}
    return Effect(inspection(before), inspection(after), **{**settings, **changes})


def test_norms_that_are_smaller_throughout_do_not_pass_for_a_cure():
    apart, none = {"has_artifacts": True, "share": 0.05}, {"has_artifacts": False, "share": 0.05}
    assert faked({"share": 0.05}, {"share": 0.0}, none).succeeded
    effect = faked({"share": 0.05}, {"share": 0.0}, apart)
    assert not effect.succeeded
    assert "from 5 % to 0 % of the patches, but by its own norms 5 % stand apart" in effect.sentences()[0]


def test_limits_are_those_that_were_asked_for():
    none = {"has_artifacts": False, "share": 0.0}
    for after, min_fall, expected in [(0.02, 0.6, True), (0.0201, 0.6, False), (0.0, 1.0, True)]:
        assert faked({"share": 0.05}, {"share": after}, none, min_fall=min_fall).succeeded == expected
    for cosine, expected in [(0.91, True), (0.89, False)]:
        assert faked({"share": 0.05}, {"share": 0.0}, none, cosine_mean=cosine).succeeded == expected


def test_every_reason_is_told():
    effect = faked({"share": 0.05}, {"share": 0.04}, {"has_artifacts": False, "share": 0}, cosine_mean=0.5)
    assert effect.sentences()[0] == (
        "No success: outliers went from 5 % to 4 % of the patches, where a fall by 50 % was asked for; and CLS moved "
        "by 0.5 (1 less the mean cosine), where the tolerance is 0.1."
    )


def test_low_norms_are_counted_the_other_way_round():
    low = {"share": 0.05, "side": "low"}
    effect = faked(low, {**low, "share": 0.0}, {"has_artifacts": False, "share": 0})
    assert effect.norm_ratios == (4, 4) and "below 10 after layer 2" in effect.sentences()[0]
    assert "The median norm of a patch over the smallest went from 4 to 4." in effect.sentences()
    assert "| Median norm of a patch over the smallest | 4 | 4 |" in effect.markdown()


def test_markdown_has_the_verdict_a_table_and_where_it_comes_from(cure):
    text = cure.markdown()
    assert text.startswith("**Success**: outliers fell from 6.25 % to 0 % of the patches, by their norm above ")
    assert "| Patches that are outliers | 6.25 % | 0 % |" in text and "| They are artifacts | yes | no |" in text
    assert f"| CLS: mean cosine with before | {NOTHING} | {cure.cosine_mean:.4f} |" in text
    assert "Measured on 24 images at 28x42 pixels" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 4 for line in rows)


def test_another_model_is_refused(before):
    with pytest.raises(ValueError, match="not one model before and after: their hidden_size is 48 and 24"):
        measure_effect(before, planted_encoder(1.0, hidden_size=24), IMAGES)
    for limits in ({"cls_tolerance": -0.1}, {"min_fall": 0}, {"min_fall": 1.1}, {"cls_tolerance": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            measure_effect(before, before, IMAGES, **limits)

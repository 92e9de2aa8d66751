# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from test_conversion_checkpoints import TINY, original_checkpoint

from conversion import dinov2, parity
from conversion.family import ConversionError
from hf_vitreg import ViTRegConfig


ONES = torch.ones(1, 2, 3)


def compared(ours, theirs):
    [row] = parity.compare(lambda pixels: {"tokens": ours}, lambda pixels: {"tokens": theirs}, [(14, 28)])
    return row


def test_figures_computed_by_hand():
    ours, theirs = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[[4.0, 3.0], [0.0, 2.5]]])
    row = compared(ours, theirs)
    assert (row.output, row.height, row.width) == ("tokens", 14, 28)
    assert row.max_abs_diff == 1.0
    assert row.relative == 0.25
    assert row.cosine == pytest.approx(24 / 25)


def test_equal_outputs_pass_even_where_they_are_zero():
    row = compared(0 * ONES, 0 * ONES)
    assert row.passed and row.max_abs_diff == 0 and row.cosine == 1
    parity.check([row], "theirs")


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (ONES * (1 + 2e-5), ONES),
        (torch.stack([ONES[0] * torch.tensor([[1.0], [math.nan]])]), ONES),
        (ONES, ONES * math.nan),
        (ONES * math.inf, ONES),
        (ONES * math.inf, ONES * math.inf),
    ],
)
def test_differences_and_values_that_are_not_finite_fail(ours, theirs):
    row = compared(ours, theirs)
    assert not row.passed
    with pytest.raises(ConversionError, match=r"1 of 2 comparisons .* tolerance of 1e-05, the worst at 14x28"):
        parity.check([compared(ONES, ONES), row], "theirs")


def test_another_shape_is_an_error_and_never_broadcast():
    with pytest.raises(AssertionError, match=r"\(1, 2, 3\) here and \(1, 1, 3\)"):
        compared(ONES, ONES[:, :1])
    with pytest.raises(AssertionError, match="return"):
        parity.compare(lambda pixels: {"tokens": ONES}, lambda pixels: {"logits": ONES}, [(14, 14)])


def test_images_have_the_size_and_channels_asked_for_and_are_the_same_for_both():
    seen = []

    def model(pixel_values):
        seen.append(pixel_values)
        return {"tokens": ONES}

    parity.compare(model, model, [(14, 28), (42, 14)], num_channels=5)
    assert [tuple(pixels.shape) for pixels in seen] == [(1, 5, 14, 28)] * 2 + [(1, 5, 42, 14)] * 2
    assert seen[0] is seen[1]


def test_sizes_native_smaller_larger_and_not_square():
    small = ViTRegConfig(hidden_size=384, num_attention_heads=6, image_size=518)
    sizes = parity.comparison_sizes(small)
    assert (518, 518) in sizes and max(sizes) > (518, 518) > min(sizes)
    assert any(height != width for height, width in sizes)
    large = ViTRegConfig(hidden_size=1024, num_hidden_layers=24, image_size=518)
    assert (518, 518) in parity.comparison_sizes(large)
    giant = ViTRegConfig(hidden_size=1536, num_hidden_layers=40, use_swiglu_ffn=True, image_size=518)
    assert parity.comparison_sizes(giant) == [(98, 98), (98, 126), (224, 224)]


def prepared(tmp_path, dtype=torch.float32, num_registers=3, **options):
    tensors = original_checkpoint(**{**TINY, "num_registers": num_registers})
    # a new name every time: the file of a model that is still there must not change
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
    torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    return dinov2.prepare(str(path), **options)


def compare_prepared(model, reference, sizes):
    return parity.compare(parity.vitreg_outputs(model), reference, sizes)


@pytest.mark.parametrize("dtype, num_registers", [(torch.bfloat16, 3), (torch.float16, 0), (torch.float64, 0)])
def test_weights_of_any_dtype_are_compared_in_float32(tmp_path, dtype, num_registers):
    candidate = prepared(tmp_path, dtype, num_registers)
    assert candidate.model.dtype == dtype
    rows = compare_prepared(candidate.model, candidate.reference, [(70, 70), (42, 98)])
    assert max(row.relative for row in rows) < 2e-6
    assert candidate.model.dtype == dtype


# not the bias of the keys: it adds the same to all logits of a query, which softmax takes away again
@pytest.mark.parametrize("name", ["embeddings.register_tokens", "encoder.layer.1.attention.q_proj.bias"])
def test_one_wrong_tensor_is_seen(tmp_path, name):
    candidate = prepared(tmp_path)
    tensor = candidate.model.get_parameter(name)
    tensor.data = tensor.data + 0.01 * torch.randn(tensor.shape)
    rows = compare_prepared(candidate.model, candidate.reference, [(98, 70)])
    with pytest.raises(ConversionError, match="not the same as timm"):
        parity.check(rows, candidate.reference_name)


@pytest.mark.parametrize("num_registers, published", [(0, (False, 0.1)), (3, (True, 0.0))])
def test_another_interpolation_is_seen_at_every_size_but_the_native(tmp_path, num_registers, published):
    candidate = prepared(tmp_path, num_registers=num_registers)
    config = candidate.model.config
    assert (config.interpolate_antialias, config.interpolate_offset) == published
    for antialias, offset in {(False, 0.1), (True, 0.0), (False, 0.0)} - {published}:
        other = prepared(
            tmp_path, num_registers=num_registers, interpolate_antialias=antialias, interpolate_offset=offset
        )
        native, larger, smaller = compare_prepared(other.model, candidate.reference, [(70, 70), (112, 98), (28, 42)])
        assert native.passed and not larger.passed and not smaller.passed
        # and the reference follows where the user says so
        assert all(row.passed for row in compare_prepared(other.model, other.reference, [(112, 98), (28, 42)]))

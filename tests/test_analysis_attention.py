# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest
import torch
from reference import COLS, NUM_REGISTERS, ROWS, images, randomize, tiny_config
from sklearn.decomposition import PCA

from hf_vitreg import ViTRegModel
from hf_vitreg.analysis.attention import (
    MeanAttention,
    PatchComponents,
    PrefixSimilarity,
    attention_entropy,
    attention_maps,
    norm_maps,
    prefix_mass,
)


NUM_IMAGES, NUM_HEADS, NUM_QUERIES, NUM_PREFIX, DIM = 13, 2, 4, 1 + NUM_REGISTERS, 11
NUM_TOKENS = NUM_PREFIX + ROWS * COLS


@pytest.fixture
def probabilities():
    return torch.randn(NUM_IMAGES, NUM_HEADS, NUM_QUERIES, NUM_TOKENS).mul(3).softmax(-1)


# Attention


def test_maps_are_over_the_patches_in_rows(probabilities):
    maps = attention_maps(probabilities, NUM_PREFIX, ROWS, COLS)
    assert maps.shape == (NUM_IMAGES, NUM_HEADS, NUM_QUERIES, ROWS, COLS)
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(NUM_IMAGES, NUM_HEADS, NUM_QUERIES))
    token = NUM_PREFIX + 2 * COLS + 4
    expected = probabilities[..., token] / probabilities[..., NUM_PREFIX:].sum(-1)
    torch.testing.assert_close(maps[..., 2, 4], expected)


def test_attention_to_prefix_tokens_alone_has_an_empty_map():
    probabilities = torch.zeros(1, 1, 1, NUM_TOKENS)
    probabilities[..., 2] = 1
    assert attention_maps(probabilities, NUM_PREFIX, ROWS, COLS).eq(0).all()
    assert prefix_mass(probabilities, NUM_PREFIX).item() == 1
    assert attention_entropy(probabilities).item() == 0


def test_mass_and_entropy_are_known_for_even_attention():
    even = torch.full((1, 1, 1, NUM_TOKENS), 1 / NUM_TOKENS)
    assert prefix_mass(even, NUM_PREFIX).item() == pytest.approx(NUM_PREFIX / NUM_TOKENS)
    assert prefix_mass(even, 0).item() == 0
    assert attention_entropy(even).item() == pytest.approx(math.log(NUM_TOKENS), rel=1e-6)
    assert attention_entropy(torch.tensor([[[[0.5, 0.5, 0, 0]]]])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_mean_attention_is_over_images(probabilities, batch_size):
    measured = MeanAttention(NUM_PREFIX, ROWS, COLS)
    for part in probabilities[torch.randperm(NUM_IMAGES)].split(batch_size):
        measured.update(part)
    expected = attention_maps(probabilities, NUM_PREFIX, ROWS, COLS).double().mean(0)
    assert measured.num_images == NUM_IMAGES and measured.maps.shape == (NUM_HEADS, NUM_QUERIES, ROWS, COLS)
    torch.testing.assert_close(measured.maps, expected, rtol=1e-6, atol=0)
    mass = probabilities[..., :NUM_PREFIX].double().sum(-1).mean(0)
    torch.testing.assert_close(measured.prefix_mass, mass, rtol=1e-6, atol=0)
    entropy = -(probabilities.double() * probabilities.double().log()).sum(-1).mean(0)
    torch.testing.assert_close(measured.entropy, entropy, rtol=1e-5, atol=0)


def test_maps_of_a_model_are_those_of_its_attention():
    model = randomize(ViTRegModel(tiny_config(attn_implementation="eager")))
    with torch.no_grad():
        probabilities = model(images(), output_attentions=True).attentions[-1]
    registers = probabilities[:, :, model.config.register_slice]
    maps = attention_maps(registers, model.config.num_prefix_tokens, ROWS, COLS)
    assert maps.shape[2:] == (NUM_REGISTERS, ROWS, COLS)
    kept = 1 - prefix_mass(registers, model.config.num_prefix_tokens)
    torch.testing.assert_close(maps.flatten(3) * kept[..., None], registers[..., model.config.num_prefix_tokens :])


def test_bad_attention_is_named(probabilities):
    with pytest.raises(ValueError, match=r"probabilities must have shape \(batch, heads, queries, 27\), got"):
        attention_maps(probabilities[..., 1:], NUM_PREFIX, ROWS, COLS)
    with pytest.raises(ValueError, match="apply softmax first"):
        attention_maps(probabilities - 0.5, NUM_PREFIX, ROWS, COLS)
    with pytest.raises(ValueError, match="no image"):
        _ = MeanAttention(NUM_PREFIX, ROWS, COLS).maps
    probabilities[0, 0, 0, 0] = math.nan
    for measure in (
        lambda: attention_entropy(probabilities),
        lambda: prefix_mass(probabilities, NUM_PREFIX),
        lambda: MeanAttention(NUM_PREFIX, ROWS, COLS).update(probabilities),
    ):
        with pytest.raises(ValueError, match="probabilities must be finite"):
            measure()


# Similarity of prefix tokens


@pytest.mark.parametrize("batch_size", [1, 4, NUM_IMAGES])
def test_similarity_is_the_mean_cosine(batch_size):
    tokens = 0.5 + torch.randn(NUM_IMAGES, NUM_PREFIX, DIM)
    measured = PrefixSimilarity()
    for part in tokens[torch.randperm(NUM_IMAGES)].split(batch_size):
        measured.update(part)
    expected = torch.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1).mean(0)
    torch.testing.assert_close(measured.matrix.float(), expected)
    assert measured.matrix.diagonal().tolist() == pytest.approx([1] * NUM_PREFIX)


def test_similarity_of_no_prefix_tokens_is_empty():
    measured = PrefixSimilarity()
    measured.update(torch.randn(2, 0, DIM))
    assert measured.matrix.shape == (0, 0)
    with pytest.raises(ValueError, match="no image"):
        _ = PrefixSimilarity().matrix
    with pytest.raises(ValueError, match="prefix_tokens must be finite"):
        measured.update(torch.full((1, 2, 3), math.inf))


# Principal components


def patches(noise: float = 0.1) -> torch.Tensor:
    """Three directions with standard deviations of about 9, 4 and 2, and noise, around a mean."""
    directions = torch.linalg.qr(torch.randn(DIM, 3)).Q.T
    tokens = torch.randn(NUM_IMAGES, ROWS * COLS, 3) * torch.tensor([9.0, 4, 2]) @ directions
    return tokens + noise * torch.randn(NUM_IMAGES, ROWS * COLS, DIM) + 20


def fitted(tokens: torch.Tensor, batch_size: int = NUM_IMAGES, **values):
    components = PatchComponents(**values)
    for part in tokens.split(batch_size):
        components.update(part)
    return components.fit()


def test_components_are_those_of_sklearn_but_for_the_sign():
    tokens = patches()
    components = fitted(tokens, batch_size=4)
    flat = tokens.flatten(0, 1).double().numpy()
    reference = PCA(3).fit(flat)
    signs = np.sign((reference.components_ * components.directions.numpy()).sum(1))
    np.testing.assert_allclose(components.directions, signs[:, None] * reference.components_, atol=1e-9)
    # theirs is over one less
    np.testing.assert_allclose(components.std**2, reference.explained_variance_ * (1 - 1 / len(flat)))
    np.testing.assert_allclose(components.variance_share, reference.explained_variance_ratio_)
    np.testing.assert_allclose(components.mean, reference.mean_)


def test_components_are_those_of_the_singular_vectors():
    tokens = patches(noise=1.0)
    centred = (tokens - tokens.mean((0, 1))).flatten(0, 1).double()
    _, singular_values, vectors = torch.linalg.svd(centred, full_matrices=False)
    components = fitted(tokens, num_components=5)
    torch.testing.assert_close(components.std, singular_values[:5] / len(centred) ** 0.5, rtol=1e-6, atol=0)
    torch.testing.assert_close((components.directions * vectors[:5]).sum(1).abs(), torch.ones(5, dtype=torch.float64))
    for direction in components.directions:
        assert direction[direction.abs().argmax()] > 0


@pytest.mark.parametrize("batch_size", [1, 6])
def test_components_do_not_depend_on_batches_or_order(batch_size):
    tokens = patches(noise=0.5)
    expected, actual = fitted(tokens), fitted(tokens[torch.randperm(NUM_IMAGES)], batch_size)
    torch.testing.assert_close(actual.directions, expected.directions, rtol=0, atol=1e-9)
    torch.testing.assert_close(actual.colours(tokens), expected.colours(tokens), rtol=0, atol=1e-6)


def test_colours_are_whitened_and_end_at_three_standard_deviations():
    tokens = patches()
    components = fitted(tokens)
    whitened = components.whitened(tokens).flatten(0, 1)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(whitened.T @ whitened / len(whitened), torch.eye(3, dtype=torch.float64))
    colours = components.colours(tokens)
    assert colours.shape == (NUM_IMAGES, ROWS * COLS, 3) and colours.dtype == torch.float32
    for distance, expected in [(-5, 0.0), (-3, 0.0), (0, 0.5), (1.5, 0.75), (3, 1.0), (9, 1.0)]:
        token = components.mean + distance * components.std[1] * components.directions[1]
        assert components.colours(token).tolist() == pytest.approx([0.5, expected, 0.5], abs=1e-6)


def test_colours_of_tokens_without_variance_are_grey():
    tokens = torch.ones(2, 5, DIM)
    assert fitted(tokens).colours(tokens).eq(0.5).all()
    # one direction has all there is
    line = torch.randn(40, 1) * torch.ones(DIM)
    colours = fitted(line).colours(line)
    assert colours[:, 0].std() > 0.1 and colours[:, 1:].eq(0.5).all()


def test_bad_patches_are_named():
    with pytest.raises(ValueError, match="3 components need at least as many channels, got 2"):
        PatchComponents().update(torch.randn(5, 2))
    with pytest.raises(ValueError, match="patch_tokens must be finite"):
        PatchComponents().update(torch.full((5, 3), math.nan))
    with pytest.raises(ValueError, match="two tokens or more"):
        PatchComponents().fit()


# Norm maps


def test_norm_maps_are_in_rows():
    tokens = torch.randn(NUM_IMAGES, ROWS * COLS, DIM, dtype=torch.bfloat16)
    maps = norm_maps(tokens, ROWS, COLS)
    assert maps.shape == (NUM_IMAGES, ROWS, COLS)
    torch.testing.assert_close(maps[:, 1, 4], tokens[:, COLS + 4].float().norm(dim=-1))
    with pytest.raises(ValueError, match=r"must have shape \(batch, 21, dim\)"):
        norm_maps(tokens[:, 1:], ROWS, COLS)
    with pytest.raises(ValueError, match="patch_tokens must be finite"):
        norm_maps(tokens * math.inf, ROWS, COLS)

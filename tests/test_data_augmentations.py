# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pickle

import pytest
import torch
from sample_images import colour_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hf_vitreg.data.augmentations import clip_transform, post_hoc_transform
from hf_vitreg.distributed import forked_rng
from hf_vitreg.objective_options import CLIPOptions, PostHocOptions


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_an_image_with_a_text_is_cropped_as_open_clip_does():
    """`RandomResizedCrop` with nine tenths of the image or more, bicubic, then normalization."""
    image = colour_image(0, 1)
    transform = pickle.loads(pickle.dumps(clip_transform(CLIPOptions(), 13, MEAN, STD)))
    reference = v2.RandomResizedCrop(13, scale=(0.9, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    for seed in range(5):
        with forked_rng(seed):
            found = transform(image)["pixel_values"]
        with forked_rng(seed):
            expected = F.normalize(F.pil_to_tensor(reference(image)) / 255, MEAN, STD)
        assert found.shape == (3, 13, 13) and (found - expected).abs().max() < 1.1 / 255 / min(STD)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_it_is_flipped_where_asked_for(flip):
    image = colour_image(0, 1, height=13, width=13)
    plain = F.normalize(F.pil_to_tensor(image) / 255, MEAN, STD)
    found = clip_transform(CLIPOptions(clip_crop_min_scale=1.0, clip_flip=flip), 13, MEAN, STD)(image)["pixel_values"]
    assert torch.allclose(found, plain.flip(-1) if flip else plain, atol=1e-5)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_registers_are_distilled_on_a_square_of_all_of_the_shorter_edge(flip):
    image = colour_image(0, 1, height=26, width=40)
    options = PostHocOptions(post_hoc_flip=flip)
    transform = pickle.loads(pickle.dumps(post_hoc_transform(options, 13, MEAN, STD)))
    resized = F.resize(F.pil_to_tensor(image), [13], v2.InterpolationMode.BICUBIC, antialias=True)
    wide = F.normalize(resized / 255, MEAN, STD)
    places = set()
    for seed in range(12):
        with forked_rng(seed):
            found = transform(image)["pixel_values"]
        found = found.flip(-1) if flip else found
        places |= {left for left in range(8) if torch.allclose(found, wide[..., left : left + 13], atol=1e-5)}
    assert len(places) > 2

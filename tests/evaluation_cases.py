# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Small models and data of every task of the evaluation, in folders."""

from pathlib import Path

import numpy as np
import PIL.Image
from reference import randomize, tiny_config
from sample_images import write_folder
from test_data_boxes import voc_object, write_voc

from hf_vitreg import ViTRegModel
from hf_vitreg.data.transforms import new_image_processor


SIDE = 28  # pixels, four patches
CLASSES = ("ground", "wall", "sky")
TRAIN, VALIDATION = {"ant": 6, "bee": 7, "cat": 5}, {"ant": 3, "bee": 2, "cat": 3}
README = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
---

# tiny
"""


def save_model(folder: Path, **overrides) -> Path:
    """A tiny ViTReg with its processor and its card."""
    model = randomize(ViTRegModel(tiny_config(**{"image_size": SIDE, **overrides})))
    model.save_pretrained(folder)
    new_image_processor(SIDE).save_pretrained(folder)
    (folder / "README.md").write_text(README)
    return folder


def labelled(folder: Path) -> Path:
    """A folder of images by split and class, which their colour tells."""
    write_folder(folder / "train", TRAIN)
    write_folder(folder / "validation", VALIDATION)
    return folder


def blocks(index: int, height: int = 35, width: int = 49) -> np.ndarray:
    """`(height, width)` of three classes in blocks of the size of a patch."""
    generator = np.random.default_rng(index)
    return np.kron(generator.integers(0, 3, (height // 7, width // 7)), np.ones((7, 7))).astype(np.uint8)


def dense(folder: Path, counts=(("train", 6), ("validation", 3))) -> Path:
    """Images with masks, of which some pixels do not count, and with depth maps, of which some are not known."""
    for split, count in counts:
        for index in range(count):
            classes = blocks(index + 100 * (split == "train"))
            noise = np.random.default_rng(index).integers(0, 20, (*classes.shape, 3))
            pixels = np.stack([(classes == value) * 200 for value in range(3)], axis=2) + noise
            depth = 1000 * (1 + classes.astype(np.uint16))
            mask = classes.copy()
            mask[:3], depth[:3] = 255, 0
            for kind, content in (("images", pixels.astype(np.uint8)), ("labels", mask), ("depth", depth)):
                path = folder / split / kind / f"{index:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(content).save(path)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder


def voc(folder: Path, count: int = 5) -> Path:
    """VOC's layout, images of 23x37 pixels with one box each, by turns of most of the image and of little."""
    boxes = [(3 + index, 2, 17 + index, 19) if index % 2 else (2, 1, 36, 22 - index) for index in range(count)]
    return write_voc(folder, {f"{index:02d}": [voc_object(box)] for index, box in enumerate(boxes)})

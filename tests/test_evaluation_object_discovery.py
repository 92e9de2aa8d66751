# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.nn import functional

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.evaluation.box_files import draw_boxes, write_coco
from hf_vitreg.evaluation.image_boxes import BoxFinder, LostSettings
from hf_vitreg.evaluation.lost import attention_boxes, lost_boxes
from hf_vitreg.evaluation.object_discovery import default_facet, discover_objects, tune_object_discovery
from hf_vitreg.features import VisionEncoder
from hf_vitreg.metrics.corloc import is_found


PATCH = 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@dataclass
class Photographs:
    """Images in memory, of several sizes, with one box each."""

    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(31, 23), (17, 37), (32, 24), (17, 37), (31, 21)])
    display_name: str = "photographs"

    def __len__(self):
        return len(self.sizes)

    def name(self, index):
        return f"albums/photograph {index}.png"

    def content(self, index):
        return self.image(index).tobytes()

    def image(self, index):
        height, width = self.sizes[index]
        pixels = np.random.RandomState(index).randint(0, 90, (height, width, 3))
        left, top, right, bottom = self.boxes(index)[0].astype(int)
        pixels[top:bottom, left:right, index % 3] += 150
        return PIL.Image.fromarray(pixels.astype("uint8"))

    def boxes(self, index):
        height, width = self.sizes[index]
        return np.array([[width // 4, height // 3, width // 4 + 9 + index, height // 3 + 8]], dtype=np.float64)


def tiny_encoder(**changes) -> VisionEncoder:
    torch.manual_seed(0)
    config = {"hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 5, "image_size": (20, 28)}
    model = ViTRegModel(ViTRegConfig(**{**config, "patch_size": PATCH, "num_register_tokens": 3, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return VisionEncoder.wrap(model, "tiny", MEAN, STD)


def padded(data: Photographs, index: int) -> torch.Tensor:
    """As the published protocol has it: `(1, 3, height, width)` with zeros where the image ends."""
    pixels = torch.from_numpy(np.array(data.image(index))).permute(2, 0, 1)[None] / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    height, width = pixels.shape[-2:]
    return functional.pad(pixels, (0, -width % PATCH, 0, -height % PATCH))


@pytest.mark.parametrize("facet", ["query", "key", "value", "output"])
def test_lost_sees_the_patches_of_each_image_at_its_own_size(facet):
    encoder, data = tiny_encoder(), Photographs()
    objects = discover_objects(encoder, data, layer=1, facet=facet, normalize=True, bias=-0.1, batch_size=3)
    for index, size in enumerate(data.sizes):
        pixels = padded(data, index)
        if facet == "output":
            tokens = encoder.final(encoder.layers(pixels, [1])[1])
        else:
            tokens = encoder.qkv(pixels, 1, facet)
        assert encoder.num_prefix_tokens == 4
        grid = encoder.grid(*pixels.shape[-2:])
        expected = lost_boxes(tokens[:, 4:], *grid, PATCH, size, normalize=True, bias=-0.1)
        assert objects.boxes[index].tolist() == expected.boxes[0].tolist()
        assert tuple(objects.image_sizes[index]) == size
        assert objects.found[index] == is_found(objects.boxes[index], data.boxes(index))
    assert objects.corloc == pytest.approx(np.mean(objects.found)) and objects.resized_to is None


def test_the_baseline_sees_the_attention_of_cls_to_the_patches():
    encoder, data = tiny_encoder(), Photographs()
    objects = discover_objects(encoder, data, "attention", layer=-2, head=3, kept_mass=0.4, batch_size=2)
    for index, size in enumerate(data.sizes):
        pixels = padded(data, index)
        weights = encoder.attention(pixels, 1)[:, 3, 0, 4:]
        expected = attention_boxes(weights, *encoder.grid(*pixels.shape[-2:]), PATCH, size, kept_mass=0.4)
        assert objects.boxes[index].tolist() == expected[0].tolist()
    assert objects.summary()["method"] == "attention" and objects.summary()["head"] == 3


def test_batches_change_nothing():
    encoder, data = tiny_encoder(), Photographs()
    boxes = [discover_objects(encoder, data, batch_size=batch_size).boxes for batch_size in (1, 2, 7)]
    assert np.array_equal(boxes[0], boxes[1]) and np.array_equal(boxes[0], boxes[2])


def test_several_settings_take_one_pass(monkeypatch):
    encoder, data, passes = tiny_encoder(), Photographs(), []
    finder = BoxFinder(encoder, data, batch_size=5)
    assert finder.resized_to is None
    monkeypatch.setattr(encoder.model, "forward", lambda *args, own=encoder.model.forward: passes.append(own(*args)))
    settings = [LostSettings(layer, facet) for layer in (0, -1) for facet in ("key", "value", "output")]
    settings += [replace(each, bias=-0.3) for each in settings]
    together = finder.boxes(range(5), settings)
    assert len(passes) == 2  # padded the five images have two sizes
    for each in settings:
        assert finder.boxes(range(5), [each])[each] == together[each]


def test_a_model_of_one_size_gets_resized_images(caplog):
    import timm  # not above, which the processes of another test import

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(12, 20), patch_size=PATCH, embed_dim=24, depth=2, num_heads=3
    )
    encoder, data = VisionEncoder.wrap(model, mean=MEAN, std=STD), Photographs()
    with caplog.at_level(logging.WARNING):
        objects = discover_objects(encoder, data)
    assert "takes no images but of 12x20 pixels: all are resized" in caplog.text
    assert objects.resized_to == (12, 20) and objects.summary()["resized_to"] == (12, 20)
    image = data.image(1).resize((20, 12), PIL.Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(image)) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    features = encoder.qkv(pixels.permute(2, 0, 1)[None], -1, "key")[:, 1:]
    left, top, right, bottom = lost_boxes(features, 3, 5, PATCH).boxes[0].tolist()
    expected = [left / 20 * 37, top / 12 * 17, right / 20 * 37, bottom / 12 * 17]
    assert objects.boxes[1].tolist() == pytest.approx(expected)


def test_images_are_resized_where_a_size_is_given():
    objects = discover_objects(tiny_encoder(), Photographs(), size=(24, 16))
    assert objects.resized_to == (24, 16)
    assert (objects.boxes[:, 2:] <= objects.image_sizes[:, ::-1]).all()


def test_tuning_reports_the_images_that_tuned_and_what_the_others_say():
    encoder, data = tiny_encoder(), Photographs([(31, 23), (17, 37)] * 8)
    options = {"layers": (0, -1), "facets": ("key", "output"), "normalize": (True, False), "biases": (0.0, -0.3)}
    tuned = tune_object_discovery(encoder, data, **options, tuning_share=0.3, seed=4)
    assert len(tuned.tuning_indices) == 5 and len(tuned.trials) == 16
    assert tuned.settings == max(tuned.trials, key=lambda trial: trial.corloc).settings
    fixed = {name: getattr(tuned.settings, name) for name in ("layer", "facet", "normalize", "bias")}
    alone = discover_objects(encoder, data, **fixed)
    assert np.array_equal(alone.boxes, tuned.objects.boxes) and alone.corloc == tuned.objects.corloc
    others = [index for index in range(16) if index not in tuned.tuning_indices]
    assert tuned.tuning_corloc == pytest.approx(np.mean([alone.found[index] for index in tuned.tuning_indices]))
    assert tuned.corloc == pytest.approx(np.mean([alone.found[index] for index in others]))
    summary = json.loads(json.dumps(tuned.summary(data)))
    assert summary["tuning_images"] == [f"albums/photograph {index}.png" for index in tuned.tuning_indices]
    assert summary["corloc"] == tuned.corloc and summary["num_images_measured"] == 11
    draws = [tune_object_discovery(encoder, data, biases=(0.0,), seed=seed).tuning_indices for seed in (4, 4, 5)]
    assert draws[0] == draws[1] != draws[2]


def test_facets_are_those_of_the_paper():
    encoder = tiny_encoder()
    assert default_facet(encoder) == "key"
    assert default_facet(replace(encoder, source="timm deit3_base_patch16_224")) == "value"
    assert default_facet(replace(encoder, name="converted/vitreg-deit-iii-base")) == "value"
    assert default_facet(replace(encoder, source="transformers clip_vision_model")) == "value"
    assert default_facet(replace(encoder, source="transformers deit")) == "key"


def test_images_without_true_boxes_are_boxed_and_not_scored():
    class Unannotated(Photographs):
        boxes = None

        def image(self, index):
            return Photographs().image(index)

        def __getattribute__(self, name):
            if name == "boxes":
                raise AttributeError(name)
            return super().__getattribute__(name)

    objects = discover_objects(tiny_encoder(), Unannotated())
    assert objects.corloc is None and objects.found == [None] * 5 and objects.boxes.shape == (5, 4)
    with pytest.raises(ValueError, match="photographs has no boxes to tune with"):
        tune_object_discovery(tiny_encoder(), Unannotated())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"method": "dino"}, "'dino'"),
        ({"facet": "keys"}, "one of 'query', 'key', 'value', 'output', got 'keys'"),
        ({"layer": 3}, "layer 3 does not exist"),
        ({"method": "attention", "head": 5}, "head 5 does not exist: tiny has 5"),
        ({"size": (18, 20)}, "height of 18 pixels"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": Photographs([])}, "photographs has no image"),
    ],
)
def test_what_cannot_be_done_is_an_error(arguments, named):
    with pytest.raises(ValueError, match=named):
        discover_objects(**{"encoder": tiny_encoder(), "data": Photographs(), **arguments})


def test_a_model_of_unknown_normalization_is_an_error():
    with pytest.raises(ValueError, match="normalizes its images with is not known"):
        discover_objects(replace(tiny_encoder(), mean=None), Photographs())


@pytest.mark.parametrize("arguments", [{"tuning_share": 0.0}, {"tuning_share": 1.0}, {"data": Photographs([(9, 9)])}])
def test_tuning_needs_images_on_both_sides(arguments):
    with pytest.raises(ValueError, match="two images at least"):
        tune_object_discovery(**{"encoder": tiny_encoder(), "data": Photographs(), **arguments})


def test_tuning_needs_something_to_try():
    with pytest.raises(ValueError, match="nothing to try"):
        tune_object_discovery(tiny_encoder(), Photographs(), biases=())


def test_boxes_are_written_in_the_format_of_coco(tmp_path):
    data = Photographs()
    objects = discover_objects(tiny_encoder(), data)
    write_coco(tmp_path / "new" / "boxes.json", data, objects)
    written = json.loads((tmp_path / "new" / "boxes.json").read_text())
    assert [image["id"] for image in written["images"]] == [1, 2, 3, 4, 5]
    assert written["images"][1] == {"id": 2, "file_name": "photograph 1.png", "height": 17, "width": 37}
    assert written["categories"] == [{"id": 1, "name": "object"}]
    for index, annotation in enumerate(written["annotations"]):
        left, top, right, bottom = objects.boxes[index]
        assert annotation["bbox"] == [left, top, right - left, bottom - top]
        assert annotation["area"] == (right - left) * (bottom - top)
        assert (annotation["image_id"], annotation["category_id"], annotation["iscrowd"]) == (index + 1, 1, 0)
        assert annotation["score"] == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["boxes.json"]


def test_boxes_have_the_numbers_of_the_annotations(tmp_path):
    data = Photographs()
    data.image_ids = [42, 7, 391895, 3, 11]
    write_coco(tmp_path / "boxes.json", data, discover_objects(tiny_encoder(), data))
    annotations = json.loads((tmp_path / "boxes.json").read_text())["annotations"]
    assert [annotation["image_id"] for annotation in annotations] == data.image_ids


def test_boxes_are_drawn_on_their_images(tmp_path):
    data = Photographs()
    objects = replace(discover_objects(tiny_encoder(), data), found=[True, False, None, True, True])
    draw_boxes(tmp_path / "boxes.png", data, objects, max_images=3, columns=2)
    with PIL.Image.open(tmp_path / "boxes.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert {(0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)} <= colours
    assert [path.name for path in tmp_path.iterdir()] == ["boxes.png"]


TWO_PROCESSES = """
import json, sys
from accelerate import Accelerator
from hf_vitreg.metrics.corloc import CorLoc
from test_evaluation_object_discovery import Photographs, tiny_encoder
from hf_vitreg.evaluation.object_discovery import discover_objects, tune_object_discovery

accelerator, data = Accelerator(cpu=True), Photographs([(31, 23), (17, 37), (12, 16)] * 7)
objects = discover_objects(tiny_encoder(), data, batch_size=1, accelerator=accelerator)
tuned = tune_object_discovery(tiny_encoder(), data, biases=(0.0, -0.3), batch_size=1, accelerator=accelerator)
metric = CorLoc(num_process=2, process_id=accelerator.process_index, cache_dir=sys.argv[1], experiment_id="two")
own = slice(0, 8) if accelerator.is_main_process else slice(8, 21)
metric.add_batch(
    predictions=objects.boxes[own].tolist(),
    references=[data.boxes(index).tolist() for index in range(21)[own]],
)
joined = metric.compute()
found = [objects.boxes.tolist(), objects.corloc, tuned.corloc, tuned.tuning_corloc, tuned.tuning_indices, joined]
# each in its own file: prints of two processes run into each other
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump([accelerator.num_processes, *found], file)
accelerator.end_training()
"""


@pytest.mark.slow  # test_evaluation_evaluate.py has two processes, too
def test_two_processes_find_what_one_does(tmp_path):
    (tmp_path / "both.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{Path(__file__).parent}:{Path(__file__).parent.parent / 'src'}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "both.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[:-1] == second[:-1] and first[0] == 2
    data = Photographs([(31, 23), (17, 37), (12, 16)] * 7)
    objects = discover_objects(tiny_encoder(), data, batch_size=1)
    tuned = tune_object_discovery(tiny_encoder(), data, biases=(0.0, -0.3), batch_size=1)
    expected = [objects.boxes.tolist(), objects.corloc, tuned.corloc, tuned.tuning_corloc, tuned.tuning_indices]
    assert first[1:-1] == expected
    assert first[-1] == {"corloc": pytest.approx(objects.corloc)} and second[-1] is None

# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A file has the features that `VisionEncoder` gives image by image, and the same bytes however often it was begun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from reference import WITHOUT_CLS, randomize, relative_error, tiny_config
from safetensors.torch import load_file
from sample_images import colour_image, write_parquet
from transformers import ViTConfig, ViTModel

from hf_vitreg import ViTRegModel, matmul
from hf_vitreg.data.image_data import decode
from hf_vitreg.deployment import extract
from hf_vitreg.deployment.extract import KINDS, Extracted, FeatureOptions, extract_features, in_background
from hf_vitreg.deployment.feature_files import PartialFeatures
from hf_vitreg.features import VisionEncoder


TOLERANCE = 1e-5
SIDE, PATCH = 28, 7
# of the first three one has whole patches, the next must be resized, the last is smaller than a patch
SIZES = [(21, 35), (23, 37), (44, 31), (5, 60), (21, 36), (22, 35), (23, 37), (40, 31), (21, 35), (60, 60), (5, 5)]
GRIDS = [(3, 5), (3, 5), (6, 4), (1, 9), (3, 5), (3, 5), (3, 5), (6, 4), (3, 5), (9, 9), (1, 1)]
NUM_IMAGES = len(SIZES)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
ROOT = Path(extract.__file__).parents[3]


def make_encoder(seed=0, **changes):
    model = randomize(ViTRegModel(tiny_config(**{"num_hidden_layers": 3, "image_size": SIDE, **changes})), seed)
    return VisionEncoder.wrap(model, "tiny", MEAN, STD)


def write_images(folder):
    folder.mkdir()
    for index, (height, width) in enumerate(SIZES):
        colour_image(index % 3, index, height, width).save(folder / f"{index:02d}.png")
    return folder


def picture(index):
    return colour_image(index % 3, index, *SIZES[index])


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "birds")


def options(**changes):
    return FeatureOptions(**{"tokens": KINDS, "batch_size": 2, **changes})


def kept(**changes):
    return options(**{"keep_size": True, **changes})


@pytest.fixture(scope="module")
def finished(encoder, folder, tmp_path_factory):
    """Bytes of the file of images that keep their size."""
    path = tmp_path_factory.mktemp("finished") / "some.parquet"
    extract_features(encoder, [folder], path, kept())
    return path.read_bytes()


def expected(encoder, index, size, layer=2):
    pixel_values = encoder.preprocess([picture(index)], size)
    final = encoder.split(encoder.final(encoder.layers(pixel_values, [layer])[layer]))
    return {
        "cls": final.cls[0],
        "registers": final.registers[0],
        "patches": final.patches[0],
        "patch_mean": final.patches[0].mean(0),
    }


# What features are


@pytest.mark.parametrize(("size", "layer"), [(None, None), ((14, 35), 2)])
def test_features_are_those_of_the_encoder_image_by_image(encoder, folder, tmp_path, size, layer):
    for suffix in ("parquet", "safetensors"):
        extract_features(encoder, [folder], tmp_path / f"some.{suffix}", options(size=size, layer=layer))
    table, tensors = pq.read_table(tmp_path / "some.parquet"), load_file(tmp_path / "some.safetensors")
    assert table["name"].to_pylist() == [f"{index:02d}.png" for index in range(NUM_IMAGES)]
    assert list(zip(table["height"].to_pylist(), table["width"].to_pylist())) == SIZES
    for index in range(NUM_IMAGES):
        wanted = expected(encoder, index, size, 2 if layer is None else layer - 1)
        for kind, values in wanted.items():
            assert relative_error(tensors[kind][index], values) < TOLERANCE, kind
            assert torch.equal(torch.tensor(table[kind][index].as_py()), tensors[kind][index]), kind
    about = json.loads(table.schema.metadata[b"hf_vitreg"])
    assert (about["model"], about["layer"], about["size"]) == ("tiny", layer or 3, list(size or (SIDE, SIDE)))


def test_images_that_keep_their_size_have_the_nearest_whole_patches(encoder, folder, tmp_path):
    extract_features(encoder, [folder], tmp_path / "some.parquet", kept())
    table = pq.read_table(tmp_path / "some.parquet")
    assert list(zip(table["rows"].to_pylist(), table["cols"].to_pylist())) == GRIDS
    assert list(zip(table["height"].to_pylist(), table["width"].to_pylist())) == SIZES
    for index, (rows, cols) in enumerate(GRIDS):
        for kind, values in expected(encoder, index, (rows * PATCH, cols * PATCH)).items():
            assert relative_error(torch.tensor(table[kind][index].as_py()), values) < TOLERANCE, (index, kind)


def test_larger_images_are_scaled_to_the_largest_side(encoder, folder, tmp_path):
    extract_features(encoder, [folder], tmp_path / "some.parquet", kept(max_side=34))
    table = pq.read_table(tmp_path / "some.parquet", columns=["rows", "cols"])
    grids = list(zip(table["rows"].to_pylist(), table["cols"].to_pylist()))
    # 34 pixels are nearer to five patches, which would be 35
    assert grids[1:4] == [(3, 4), (4, 3), (1, 4)] and grids[9:] == [(4, 4), (1, 1)]
    assert max(map(max, grids)) == 4


def test_batches_are_of_one_size_and_smaller_of_larger_images(encoder, folder, tmp_path, monkeypatch):
    shapes, forward = [], VisionEncoder._forward
    monkeypatch.setattr(
        VisionEncoder, "_forward", lambda self, pixels: shapes.append(tuple(pixels.shape)) or forward(self, pixels)
    )
    extract_features(encoder, [folder], tmp_path / "some.parquet", kept(batch_size=4))
    # the model's own size has 16 patches: four images of 15, two of 24, one of 81
    assert sorted(shapes) == [
        (1, 3, 7, 7),
        (1, 3, 7, 63),
        (1, 3, 63, 63),
        (2, 3, 21, 35),
        (2, 3, 42, 28),
        (4, 3, 21, 35),
    ]
    shapes.clear()
    extract_features(encoder, [folder], tmp_path / "other.parquet", options(batch_size=4))
    assert shapes == [(4, 3, SIDE, SIDE)] * 2 + [(3, 3, SIDE, SIDE)]


def test_images_that_wait_for_others_of_their_size_are_few(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "MAX_WAITING_BYTES", 0)
    batches = []
    features = extract._Run._features
    monkeypatch.setattr(
        extract._Run, "_features", lambda self, batch: batches.append(len(batch)) or features(self, batch)
    )
    extract_features(encoder, [folder], tmp_path / "some.parquet", kept(batch_size=8))
    assert batches == [1] * NUM_IMAGES


def test_half_precision(encoder, folder, tmp_path):
    extract_features(encoder, [folder], tmp_path / "whole.safetensors", options())
    extract_features(encoder, [folder], tmp_path / "half.safetensors", options(dtype="float16"))
    whole, half = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "half.safetensors")
    assert all(torch.equal(half[kind], whole[kind].half()) for kind in KINDS)


def test_what_does_not_fit_half_precision_is_named(encoder, folder, tmp_path, monkeypatch):
    final = VisionEncoder.final
    monkeypatch.setattr(VisionEncoder, "final", lambda self, tokens: final(self, tokens) * 1e6)
    with pytest.raises(ValueError, match=r"The cls features of 00\.png are NaN or infinite\. .* write float32"):
        extract_features(encoder, [folder], tmp_path / "some.parquet", options(dtype="float16"))


def test_a_table_mapped_or_streamed(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    source = write_parquet(tmp_path / "fish.parquet", ["a", "b", "a", "b", "b"], datasets.Value("string"))
    for name, streaming in (("mapped", False), ("streamed", True)):
        extract_features(encoder, [source], tmp_path / f"{name}.parquet", options(streaming=streaming))
    assert (tmp_path / "mapped.parquet").read_bytes() == (tmp_path / "streamed.parquet").read_bytes()
    assert pq.read_table(tmp_path / "mapped.parquet")["name"].to_pylist()[4] == "fish.parquet, row 4"


# Runs that were stopped


class Killed(BaseException):
    pass


def small_shards(monkeypatch, images=3):
    monkeypatch.setattr(extract, "SHARD_IMAGES", images)
    monkeypatch.setattr(extract, "WINDOW_BATCHES", 1)


@contextlib.contextmanager
def stopped_at(monkeypatch, what, number):
    """The `number`th call of a function raises; while images are read nothing is saved, as of a killed process."""
    calls, owner, name = [], *what
    function = getattr(owner, name)

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) >= number:
            raise Killed
        return function(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, stopping)
        if owner is extract._Run:
            patch.setattr(extract._Run, "_finish_writing", lambda self: self._wait_for_writing())
        yield


STOPS = {
    "in the first image": (extract._Run, "_prepare", 1),
    "in a later image": (extract._Run, "_prepare", 8),
    "in the model": (extract._Run, "_forward", 4),
    "between shards": (PartialFeatures, "write", 2),
    "before the file": (extract, "write_features", 1),
    "after the file was put together": (PartialFeatures, "remove", 1),
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_a_run_that_was_stopped_goes_on_to_the_same_file(encoder, folder, tmp_path, monkeypatch, stop, suffix):
    small_shards(monkeypatch)
    chosen = kept(tokens=("cls", "registers"))
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"some.{suffix}"
    extract_features(encoder, [folder], whole, chosen)
    owner, name, number = STOPS[stop]
    with stopped_at(monkeypatch, (owner, name), number):
        extract_features(encoder, [folder], path, chosen)
    assert path.exists() == (name == "remove")
    read = []
    monkeypatch.setattr(
        "hf_vitreg.deployment.image_sources.decode", lambda *given: read.append(given[1]) or decode(*given)
    )
    begun = PartialFeatures(
        path, json.loads((tmp_path / f"{path.name}.partial" / "manifest.json").read_text())["features"]
    )
    done = extract_features(encoder, [folder], path, chosen, overwrite=path.exists())
    assert path.read_bytes() == whole.read_bytes() and list(tmp_path.glob("*.partial")) == []
    assert len(read) == done.num_computed == NUM_IMAGES - begun.stop, "what is done is skipped"
    assert done.num_images == NUM_IMAGES


KILLED = """
import os, signal, sys
sys.path[:0] = ["tests"]
import test_deployment_extract as test
from hf_vitreg.deployment import extract

extract.SHARD_IMAGES = extract.WINDOW_BATCHES = 1
write = extract.PartialFeatures.write
def killing(self, shard):
    if self.num_shards == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, shard)
extract.PartialFeatures.write = killing
extract.extract_features(test.make_encoder(), [sys.argv[1]], sys.argv[2], test.options())
"""


def test_a_process_that_was_killed_goes_on_to_the_same_file(encoder, folder, tmp_path):
    path = tmp_path / "some.parquet"
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert len(list((tmp_path / "some.parquet.partial").glob("shard-*"))) == 3 and not path.exists()
    again = extract_features(encoder, [folder], path, options())
    extract_features(encoder, [folder], tmp_path / "whole.parquet", options())
    assert path.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert again.num_computed == NUM_IMAGES - 6
    assert again.sentence().startswith(f"{NUM_IMAGES} images, 6 of them computed before, ")


def test_an_interrupted_process_saves_its_whole_windows(encoder, folder, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "WINDOW_BATCHES", 2)
    prepare = extract._Run._prepare
    monkeypatch.setattr(
        extract._Run,
        "_prepare",
        lambda self, image: prepare(self, image) if image.index < 9 else pytest.fail("interrupted"),
    )
    with pytest.raises(pytest.fail.Exception):
        extract_features(encoder, [folder], tmp_path / "some.parquet", kept())
    monkeypatch.undo()
    monkeypatch.setattr(extract, "WINDOW_BATCHES", 2)
    assert extract_features(encoder, [folder], tmp_path / "some.parquet", kept()).num_computed == NUM_IMAGES - 8


def test_a_shard_that_cannot_be_written_is_not_followed_by_another(encoder, folder, tmp_path, monkeypatch):
    small_shards(monkeypatch, images=1)

    def full(self, shard):
        raise OSError("no space left")

    monkeypatch.setattr(PartialFeatures, "write", full)
    with pytest.raises(OSError, match="no space left"):
        extract_features(encoder, [folder], tmp_path / "some.parquet", kept())
    assert [path.name for path in (tmp_path / "some.parquet.partial").iterdir()] == ["manifest.json"]


@pytest.fixture
def begun(encoder, folder, tmp_path, monkeypatch):
    with stopped_at(monkeypatch, (extract, "write_features"), 1):
        extract_features(encoder, [folder], tmp_path / "some.parquet", kept())
    return tmp_path / "some.parquet"


CHANGES = {
    "other weights": ({"seed": 1}, {}, "other model weights"),
    "another epsilon": ({"layer_norm_eps": 1e-3}, {}, "other model settings"),
    "another layer": ({}, {"layer": 2}, "layer 3 then, 2 now"),
    "other tokens": ({}, {"tokens": ("cls",)}, "tokens cls,registers,patches,patch_mean then, cls now"),
    "another dtype": ({}, {"dtype": "float16"}, "dtype float32 then, float16 now"),
    "one size": ({}, {"keep_size": False}, "size kept then, 28,28 now"),
    "a largest side": ({}, {"max_side": 34}, "max side None then, 34 now"),
    "another batch size": ({}, {"batch_size": 3}, "batch size 2 then, 3 now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_of_something_else_is_refused(begun, folder, change):
    model, changes, message = CHANGES[change]
    other = make_encoder(**model)
    with pytest.raises(ValueError, match=f"partial was begun with something else: .*{message}"):
        extract_features(other, [folder], begun, kept(**changes))
    done = extract_features(other, [folder], begun, kept(**changes), overwrite=True)
    assert done.num_computed == NUM_IMAGES and begun.exists()


def test_a_run_of_other_images_is_refused(begun, encoder, tmp_path):
    with pytest.raises(ValueError, match="begun with something else: other images"):
        extract_features(encoder, [write_images(tmp_path / "others")], begun, kept())


def test_threads_and_bars_may_change(begun, encoder, folder, finished, capsys):
    done = extract_features(encoder, [str(folder)], begun, kept(num_workers=1), progress=True)
    assert done.num_computed == 0 and begun.read_bytes() == finished
    assert f"{NUM_IMAGES}/{NUM_IMAGES}" in capsys.readouterr().err


def test_a_file_that_is_there_is_replaced_only_when_asked(encoder, folder, finished, tmp_path):
    path = tmp_path / "some.parquet"
    path.write_text("mine")
    with pytest.raises(ValueError, match="There is a file"):
        extract_features(encoder, [folder], path, kept())
    assert path.read_text() == "mine"
    extract_features(encoder, [folder], path, kept(), overwrite=True)
    assert path.read_bytes() == finished


# Images that cannot be read


@pytest.fixture
def spoiled(tmp_path):
    folder = write_images(tmp_path / "birds")
    for index in (0, 4, 5, 10):
        (folder / f"{index:02d}.png").write_text("no image")
    return folder


def test_an_image_that_cannot_be_read_is_named(encoder, spoiled, tmp_path):
    with pytest.raises(ValueError, match=r"00\.png is no image that Pillow knows\. .* --skip-bad-images"):
        extract_features(encoder, [spoiled], tmp_path / "some.parquet", kept())


def test_images_that_cannot_be_read_are_left_out_and_named(encoder, spoiled, tmp_path, monkeypatch):
    small_shards(monkeypatch, images=1)
    path, skipping = tmp_path / "some.parquet", kept(skip_bad_images=True)
    with stopped_at(monkeypatch, (extract, "write_features"), 1):
        extract_features(encoder, [spoiled], path, skipping)
    with pytest.raises(ValueError, match=r"4 images were left out before\. The first: .*00\.png is no image"):
        extract_features(encoder, [spoiled], path, kept())
    done = extract_features(encoder, [spoiled], path, skipping)
    table = pq.read_table(path)
    assert done.num_images == table.num_rows == NUM_IMAGES - 4
    assert table["name"].to_pylist() == [f"{index:02d}.png" for index in (1, 2, 3, 6, 7, 8, 9)]
    assert list(done.left_out) == ["00.png", "04.png", "05.png", "10.png"]
    assert "no image that Pillow knows" in done.left_out["04.png"]
    assert list(json.loads(table.schema.metadata[b"hf_vitreg"])["left_out"]) == list(done.left_out)


def test_no_image_is_too_few(encoder, tmp_path):
    (tmp_path / "00.png").write_text("no image")
    with pytest.raises(ValueError, match=r"No image of .* can be read\. The first: .*00\.png is no image"):
        extract_features(encoder, [tmp_path], tmp_path / "some.parquet", kept(skip_bad_images=True))
    assert [path.name for path in tmp_path.iterdir()] == ["00.png"]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ("head",)}, "tokens must be among cls, registers, patches, patch_mean, got 'head'"),
        ({"tokens": ()}, "tokens must be among .* got none"),
        ({"dtype": "int8"}, "dtype must be among float32, float16, got 'int8'"),
        ({"optimize": "fast"}, "optimize must be among float32, bfloat16, int8, got 'fast'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"keep_size": True, "size": (14, 14)}, "size goes without keep_size"),
        ({"max_side": 14}, "max_side is for images that keep their size"),
        ({"layer": 4}, "tiny has layers 1 to 3, got 4"),
        ({"layer": 0}, "tiny has layers 1 to 3, got 0"),
        ({"size": (14, 36)}, "width of 36 pixels is no multiple of the patch size 7"),
        ({"keep_size": True, "max_side": 6}, "max_side is 6 pixels, less than a patch of 7"),
    ],
)
def test_what_cannot_be_had_is_refused(encoder, folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        extract_features(encoder, [folder], tmp_path / "some.parquet", options(**changes))
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_a_model_has_not_are_refused(folder, tmp_path):
    bare = make_encoder(num_register_tokens=0, **WITHOUT_CLS, pooler_type="mean")
    for kind in ("cls", "registers"):
        with pytest.raises(ValueError, match=f"tiny has no {kind}. Choose other tokens"):
            extract_features(bare, [folder], tmp_path / "some.parquet", options(tokens=(kind,)))
    unknown = VisionEncoder.wrap(bare.model)
    with pytest.raises(ValueError, match="normalizes its images with is not known"):
        extract_features(unknown, [folder], tmp_path / "some.parquet", options(tokens=("patches",)))


def test_patches_of_two_grids_make_no_tensor(encoder, folder, tmp_path):
    with pytest.raises(ValueError, match=r"02\.png has 6x4 patches, those before have 3x5.* Write a \.parquet file"):
        extract_features(encoder, [folder], tmp_path / "some.safetensors", kept())
    extract_features(encoder, [folder], tmp_path / "other.safetensors", kept(tokens=("cls",)))


def test_images_that_are_too_large_are_named(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "MAX_PATCHES", 80)
    with pytest.raises(ValueError, match=r"09\.png has 60x60 pixels, 81 patches, .* Give --max-side, as 448"):
        extract_features(encoder, [folder], tmp_path / "some.parquet", kept(skip_bad_images=True))


def test_one_process_is_enough(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="by one process"):
        extract_features(encoder, [folder], tmp_path / "some.parquet", kept())


# At once


def test_images_are_read_while_the_model_computes(encoder, folder, tmp_path, monkeypatch):
    """The model waits in its first batch until an image of the next one was read, which alone nobody would."""
    read_next, forward, prepare = threading.Event(), extract._Run._forward, extract._Run._prepare

    def waiting(self, pixels):
        assert read_next.wait(timeout=60), "nobody reads while the model computes"
        return forward(self, pixels)

    def reading(self, image):
        prepared = prepare(self, image)
        if image.index == 4:
            read_next.set()
        return prepared

    monkeypatch.setattr(extract._Run, "_forward", waiting)
    monkeypatch.setattr(extract._Run, "_prepare", reading)
    done = extract_features(encoder, [folder], tmp_path / "some.parquet", options(num_workers=1))
    assert done.num_images == NUM_IMAGES and 0 < done.model_seconds < done.seconds


def test_how_busy_the_model_was():
    done = Extracted(Path("some.parquet"), 1000, {}, 400, 10.0, 9.56)
    assert (done.images_per_second, done.model_busy) == (40.0, pytest.approx(0.956))
    assert done.sentence() == "1000 images, 600 of them computed before, 40.0 images/s, model busy 96 %"


def test_the_matmul_of_the_process_is_given_back(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        matmul, "use_fast_float32_matmul", lambda: torch.set_float32_matmul_precision("medium") or True
    )
    seen, forward = [], extract._Run._forward
    monkeypatch.setattr(
        extract._Run,
        "_forward",
        lambda self, pixels: seen.append(torch.get_float32_matmul_precision()) or forward(self, pixels),
    )
    extract_features(encoder, [folder], tmp_path / "some.parquet", options())
    assert set(seen) == {"medium"} and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("layer", [None, 2])
def test_an_optimized_model_gives_the_same(encoder, folder, tmp_path, monkeypatch, layer):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    plain, fast, half = (
        extract_features(encoder, [folder], tmp_path / f"{name}.safetensors", options(layer=layer, optimize=name)).path
        for name in (None, "float32", "bfloat16")
    )
    expected, exact, rounded = (load_file(path) for path in (plain, fast, half))
    for name in ("cls", "patches"):
        torch.testing.assert_close(exact[name], expected[name], rtol=1e-4, atol=1e-4)
        cosine = torch.nn.functional.cosine_similarity(rounded[name], expected[name], dim=-1)
        assert cosine.min() > 0.99 and not torch.equal(rounded[name], expected[name])


def test_models_that_are_no_vitreg_are_not_optimized(folder, tmp_path):
    other = VisionEncoder.wrap(ViTModel(ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2)), "vit")
    with pytest.raises(ValueError, match="optimize is for ViTReg models, which vit is not"):
        extract_features(other, [folder], tmp_path / "some.parquet", options(tokens=("cls",), optimize="float32"))


def test_what_is_read_in_the_background_comes_in_order():
    assert list(in_background(range(20), ahead=3)) == list(range(20))

    def failing():
        yield 1
        raise ZeroDivisionError

    items = in_background(failing(), ahead=3)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_the_background_reads_no_further_than_it_may_and_ends_with_its_reader():
    read, closed = [], []

    def items():
        try:
            for number in range(20):
                read.append(number)
                yield number
        finally:
            closed.append(True)

    before = threading.active_count()
    with contextlib.closing(in_background(items(), ahead=3)) as found:
        assert next(found) == 0
        assert len(read) <= 1 + 3 + 1
    assert closed == [True] and threading.active_count() == before
    assert np.array_equal(read, range(len(read)))

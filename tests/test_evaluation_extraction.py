# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Features are what `VisionEncoder` gives image by image, computed once, and never those of anything else."""

import gc
import io
import os
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from reference import WITHOUT_CLS, randomize, relative_error, tiny_config
from sample_images import colour_image, write_parquet
from torchvision.transforms import v2

from hf_vitreg import ViTRegModel
from hf_vitreg.data.image_data import decode
from hf_vitreg.data.labelled_images import load_image_data
from hf_vitreg.evaluation import extraction
from hf_vitreg.evaluation.extraction import KINDS, FeatureSpec, batch_features, extract, preprocess
from hf_vitreg.features import VisionEncoder


TOLERANCE = 1e-5
HEIGHT, WIDTH, ROWS, COLS = 14, 35, 2, 5
NUM_IMAGES, SHARD_SIZE, BATCH_SIZE = 13, 5, 2
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SPEC = FeatureSpec(kinds=KINDS, layers=(1, -1), size=(HEIGHT, WIDTH))
ROOT = Path(extraction.__file__).parents[3]


def make_encoder(seed=0, **changes):
    model = randomize(ViTRegModel(tiny_config(num_hidden_layers=3, **changes)), seed)
    return VisionEncoder.wrap(model, "tiny", MEAN, STD)


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass
class Pictures:
    """Images in memory, and how often each was decoded."""

    contents: list[bytes]
    display_name: str = "pictures"
    labels: list[int] | None = None
    class_names: list[str] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)

    def __len__(self):
        return len(self.contents)

    def name(self, index):
        return f"picture {index}"

    def content(self, index):
        return self.contents[index]

    def image(self, index):
        self.decoded.append(index)
        return decode(self.contents[index], self.name(index))


def pictures(count=NUM_IMAGES, **values):
    return Pictures([png(colour_image(index % 3, index, 20 + index, 50)) for index in range(count)], **values)


def run(encoder, data, cache_dir=None, spec=SPEC, **options):
    options = {"batch_size": BATCH_SIZE, "shard_size": SHARD_SIZE, "num_workers": 2, **options}
    return extract(encoder, data, spec, cache_dir, **options)


@pytest.fixture
def finished(encoder, tmp_path):
    return run(encoder, pictures(), tmp_path)


# What features are


def test_features_are_those_of_the_encoder_image_by_image(encoder, finished):
    for index in range(NUM_IMAGES):
        pixel_values = preprocess(encoder, pictures().image(index), SPEC)[None]
        for position, layer in enumerate((1, 2)):
            final = encoder.split(encoder.final(encoder.layers(pixel_values, [layer])[layer]))
            expected = {
                "cls": final.cls,
                "patch_mean": final.patches.mean(1),
                "register_mean": final.registers.mean(1),
                "patches": final.patches,
                **{
                    facet: encoder.qkv(pixel_values, layer, facet)[:, encoder.patch_slice]
                    for facet in ("query", "key", "value")
                },
            }
            for kind, values in expected.items():
                assert relative_error(finished[kind][index][position], values[0]) < TOLERANCE


def test_shapes_and_what_is_beside(finished):
    assert all(finished[kind].shape == (NUM_IMAGES, 2, 48) for kind in KINDS[:3])
    assert all(finished[kind].shape == (NUM_IMAGES, 2, ROWS * COLS, 48) for kind in KINDS[3:])
    assert (len(finished), finished.layers, finished.grid) == (NUM_IMAGES, (1, 2), (ROWS, COLS))
    assert finished.labels is None and finished.names[7] == "picture 7" and finished.left_out == {}
    with pytest.raises(ValueError, match="no features of the kind 'head', only cls"):
        finished["head"]


def test_one_forward_pass_for_all_kinds_and_layers(encoder, monkeypatch):
    passes = []
    forward = VisionEncoder._forward
    monkeypatch.setattr(VisionEncoder, "_forward", lambda self, pixels: passes.append(1) or forward(self, pixels))
    batch_features(encoder, torch.randn(2, 3, HEIGHT, WIDTH), SPEC)
    assert len(passes) == 1


def test_layers_come_in_the_order_asked_for(encoder):
    pixel_values = torch.randn(2, 3, HEIGHT, WIDTH)
    forth = batch_features(encoder, pixel_values, FeatureSpec(kinds=("cls", "key"), layers=(0, 2)))
    back = batch_features(encoder, pixel_values, FeatureSpec(kinds=("cls", "key"), layers=(-1, 0)))
    assert all(torch.equal(forth[kind].flip(1), back[kind]) for kind in ("cls", "key"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_in_half_precision(encoder, finished, tmp_path, dtype):
    spec = FeatureSpec(kinds=("patches",), layers=(1, -1), size=(HEIGHT, WIDTH), dtype=dtype)
    half = run(encoder, pictures(), tmp_path, spec)
    assert half["patches"].dtype == dtype
    assert torch.equal(half["patches"].tensor(), finished["patches"].tensor().to(dtype))


@pytest.mark.parametrize(("width", "height"), [(50, 23), (23, 50), (41, 41), (640, 427), (500, 333)])
def test_crop_is_the_usual_evaluation_transform(encoder, width, height):
    image = colour_image(1, 2, height, width)
    spec = FeatureSpec(size=(35, 35), preprocessing="crop")
    usual = v2.Compose(
        [
            v2.Resize(round(35 * 256 / 224), interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(35),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    assert torch.allclose(preprocess(encoder, image, spec), usual(image), atol=1e-6)


def test_three_ways_to_come_to_a_size(encoder):
    image = colour_image(0, 3, 90, 60)
    ways = {
        way: preprocess(encoder, image, FeatureSpec(size=(HEIGHT, WIDTH), preprocessing=way))
        for way in ("crop", "fit", "stretch")
    }
    assert all(pixels.shape == (3, HEIGHT, WIDTH) for pixels in ways.values())
    assert torch.equal(ways["fit"], encoder.preprocess([image], (HEIGHT, WIDTH))[0])
    stretched = image.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC)
    assert torch.equal(ways["stretch"], encoder.preprocess([stretched], (HEIGHT, WIDTH))[0])
    # covers 16x40 pixels: 40 wide and 60 high
    resized = image.resize((40, 60), PIL.Image.Resampling.BICUBIC).crop((2, 23, 37, 37))
    assert torch.equal(ways["crop"], encoder.preprocess([resized], (HEIGHT, WIDTH))[0])


def test_labels_are_those_of_the_data_as_it_is_now(encoder, tmp_path):
    first = run(encoder, pictures(labels=[0] * NUM_IMAGES, class_names=["a", "b"]), tmp_path)
    data = pictures(labels=[index % 2 for index in range(NUM_IMAGES)], class_names=["b", "a"])
    second = run(encoder, data, tmp_path)
    assert first.labels.tolist() == [0] * NUM_IMAGES and second.labels.tolist() == data.labels
    assert second.class_names == ["b", "a"] and data.decoded == []
    with pytest.raises(ValueError, match="pictures has 2 labels for 13 images"):
        run(encoder, pictures(labels=[0, 1]), tmp_path)


# The cache


def test_a_finished_cache_is_read_and_not_computed(encoder, finished, tmp_path):
    data = pictures()
    again = run(encoder, data, tmp_path)
    assert data.decoded == [] and again.folder == finished.folder
    assert all(torch.equal(again[kind].tensor(), finished[kind].tensor()) for kind in KINDS)
    assert sorted(path.name for path in finished.folder.iterdir()) == [
        "manifest.json",
        *(f"shard-00000{number}.safetensors" for number in range(3)),
    ]


def test_only_missing_shards_are_computed_again(encoder, finished, tmp_path):
    before = finished["patches"].tensor()
    (finished.folder / "shard-000001.safetensors").unlink()
    data = pictures()
    again = run(encoder, data, tmp_path)
    assert sorted(data.decoded) == [5, 6, 7, 8, 9]
    assert torch.equal(again["patches"].tensor(), before)


def test_a_stopped_run_goes_on(encoder, finished, tmp_path, monkeypatch):
    class Stopping(Pictures):
        def image(self, index):
            if index == 7:
                raise KeyboardInterrupt
            return super().image(index)

    with pytest.raises(KeyboardInterrupt):
        run(encoder, Stopping(pictures().contents), tmp_path / "stopped")
    folder = tmp_path / "stopped" / finished.folder.name
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "shard-000000.safetensors"}
    for name, age in (("killed", 7200), ("at-work", 60)):
        (folder / f".shard-000001.safetensors.{name}.partial").write_text("half")
        written = time.time() - age
        os.utime(folder / f".shard-000001.safetensors.{name}.partial", (written, written))
    data = pictures()
    resumed = run(encoder, data, tmp_path / "stopped")
    assert sorted(data.decoded) == list(range(5, NUM_IMAGES))
    assert all(torch.equal(resumed[kind].tensor(), finished[kind].tensor()) for kind in KINDS)
    assert [path.name for path in folder.glob(".*")] == [".shard-000001.safetensors.at-work.partial"]


def one_pixel_changed():
    data = pictures()
    image = data.image(6)
    image.putpixel((3, 5), (1, 2, 3))
    data.contents[6] = png(image)
    return data


CHANGES = {
    "other weights": lambda: {"encoder": make_encoder(seed=1)},
    "the same weights, another epsilon": lambda: {"encoder": make_encoder(layer_norm_eps=1e-3)},
    "one changed pixel": lambda: {"data": one_pixel_changed()},
    "another order": lambda: {"data": Pictures(pictures().contents[::-1])},
    "one image less": lambda: {"data": pictures(NUM_IMAGES - 1)},
    "another size": lambda: {"spec": {"size": (HEIGHT, WIDTH + 7)}},
    "another preprocessing": lambda: {"spec": {"preprocessing": "fit"}},
    "another layer": lambda: {"spec": {"layers": (0, -1)}},
    "another order of layers": lambda: {"spec": {"layers": (-1, 1)}},
    "other kinds": lambda: {"spec": {"kinds": ("cls",)}},
    "another dtype": lambda: {"spec": {"dtype": torch.float16}},
    "another normalization": lambda: {"encoder": VisionEncoder.wrap(make_encoder().model, "tiny", MEAN, MEAN)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_is_not_served_for_anything_else(encoder, finished, tmp_path, change):
    changed = CHANGES[change]()
    data = changed.get("data", pictures())
    data.decoded.clear()
    values = {"kinds": KINDS, "layers": (1, -1), "size": (HEIGHT, WIDTH), **changed.get("spec", {})}
    other = run(changed.get("encoder", encoder), data, tmp_path, FeatureSpec(**values))
    assert other.folder != finished.folder and sorted(data.decoded) == list(range(len(data)))


def test_the_same_asked_for_in_other_words_is_served(finished, tmp_path):
    spec = FeatureSpec(kinds=KINDS[::-1], layers=(-2, 2), size=(HEIGHT, WIDTH))
    model = make_encoder().model
    data = pictures(display_name="the same pictures")
    again = run(VisionEncoder.wrap(model, "another name", list(MEAN), list(STD)), data, tmp_path, spec)
    assert again.folder == finished.folder and data.decoded == []


def test_a_shard_cut_short_is_named(encoder, finished, tmp_path):
    path = finished.folder / "shard-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path} are cut short .* Delete {path}"):
        run(encoder, pictures(), tmp_path)
    path.unlink()
    assert len(run(encoder, pictures(), tmp_path)) == NUM_IMAGES


def test_a_shard_of_another_model_is_named(encoder, finished, tmp_path):
    other = run(make_encoder(seed=1), pictures(), tmp_path)
    path = finished.folder / "shard-000001.safetensors"
    path.unlink()
    (other.folder / path.name).rename(path)
    with pytest.raises(ValueError, match=rf"{path} are of another model, preprocessing or data .* Delete {path}"):
        run(encoder, pictures(), tmp_path)


def test_temporary_features_go_with_their_context(encoder, finished):
    with run(encoder, pictures()) as features:
        folder, patches = features.folder, features["patches"]
        assert folder.exists() and torch.equal(patches.tensor(), finished["patches"].tensor())
    assert not folder.exists()
    assert torch.equal(patches[3:12], finished["patches"][3:12]), "what is held stays readable"
    features = run(encoder, pictures())
    folder = features.folder
    del features
    gc.collect()
    assert not folder.exists()
    with finished:
        pass
    assert finished.folder.exists(), "what was asked to be kept is kept"


def test_temporary_files_are_removed_where_extraction_fails(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction.tempfile, "tempdir", str(tmp_path))
    data = pictures()
    data.contents[12] = b"no image"
    with pytest.raises(ValueError, match="picture 12 is no image"):
        run(encoder, data)
    assert list(tmp_path.iterdir()) == []


def test_features_of_changed_registers_are_not_kept(encoder, tmp_path):
    with encoder.replace_registers(torch.zeros(5, 48)):
        with pytest.raises(ValueError, match="has a hook on"):
            run(encoder, pictures(), tmp_path)
        assert len(run(encoder, pictures())) == NUM_IMAGES


def test_shards_are_of_a_bounded_size(encoder, monkeypatch):
    pooled = FeatureSpec(kinds=("cls", "patch_mean"), layers=(0, 1), size=(HEIGHT, WIDTH))
    assert extraction._shard_size(encoder, pooled) == 1024
    monkeypatch.setattr(extraction, "MAX_SHARD_BYTES", 50 * (ROWS * COLS * 48 * 4))
    dense = FeatureSpec(kinds=("patches",), size=(HEIGHT, WIDTH))
    assert extraction._shard_size(encoder, dense) == 32
    monkeypatch.setattr(extraction, "MAX_SHARD_BYTES", 1)
    assert extraction._shard_size(encoder, dense) == 1


def test_no_more_than_one_shard_is_in_memory(encoder, monkeypatch):
    """However many images there are: what was written is gone when the next shard begins."""
    alive = weakref.WeakSet()
    most = []
    add = extraction._Rows.add

    def counted(self, values):
        add(self, values)
        alive.add(self)
        most.append(sum(rows.length for rows in alive))

    monkeypatch.setattr(extraction._Rows, "add", counted)
    with run(encoder, pictures(40), spec=FeatureSpec(size=(HEIGHT, WIDTH))):
        assert max(most) == SHARD_SIZE


def test_images_are_decoded_no_further_ahead_than_a_batch(encoder, monkeypatch):
    data, ahead = pictures(40), []
    batches = []

    def counted(*arguments):
        batches.append(1)
        ahead.append(len(data.decoded) - BATCH_SIZE * len(batches))
        return batch_features(*arguments)

    monkeypatch.setattr(extraction, "batch_features", counted)
    with run(encoder, data, spec=FeatureSpec(size=(HEIGHT, WIDTH)), shard_size=40):
        assert max(ahead) <= BATCH_SIZE + 1


# Images that cannot be read


def with_bad_images(*bad):
    data = pictures(labels=list(range(NUM_IMAGES)), class_names=[str(index) for index in range(NUM_IMAGES)])
    for index in bad:
        data.contents[index] = b"no image"
    return data


def test_an_image_that_cannot_be_read_is_named(encoder, tmp_path):
    with pytest.raises(ValueError, match="picture 8 is no image that Pillow knows"):
        run(encoder, with_bad_images(8), tmp_path)


def test_images_that_cannot_be_read_are_left_out_and_named(encoder, finished, tmp_path):
    bad = [1, *range(5, 10)]
    for _ in range(2):
        features = run(encoder, with_bad_images(*bad), tmp_path, on_bad_image="skip")
        good = [index for index in range(NUM_IMAGES) if index not in bad]
        assert len(features) == 7 and sorted(features.left_out) == bad
        assert features.left_out[5].startswith("picture 5 is no image")
        assert features.indices.tolist() == features.labels.tolist() == good
        assert features.names[1] == "picture 2"
        assert relative_error(features["key"].tensor(), finished["key"][good]) < TOLERANCE
    with pytest.raises(ValueError, match=r"6 images of pictures were left out before\. The first: picture 1 is no"):
        run(encoder, with_bad_images(*bad), tmp_path)
    with pytest.raises(ValueError, match=r"No image of pictures can be read\. The first: picture 0"):
        run(encoder, with_bad_images(*range(NUM_IMAGES)), tmp_path, on_bad_image="skip")


def test_no_images_are_too_few(encoder, tmp_path):
    with pytest.raises(ValueError, match="pictures has no images"):
        run(encoder, Pictures([]), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("head",)}, "kinds must be among cls, .* got 'head'"),
        ({"kinds": ()}, "must be a kind and a layer"),
        ({"preprocessing": "pad"}, "preprocessing must be among crop, fit, stretch, got 'pad'"),
        ({"dtype": torch.int8}, "dtype must be among .* got torch.int8"),
        ({"layers": (3,)}, "layer 3 does not exist"),
        ({"size": (HEIGHT, 36)}, "width of 36 pixels is no multiple of the patch size 7"),
    ],
)
def test_what_cannot_be_had_is_refused(encoder, changes, message):
    with pytest.raises(ValueError, match=message):
        run(encoder, pictures(), spec=FeatureSpec(**changes))


def test_tokens_that_a_model_has_not_are_refused():
    encoder = make_encoder(num_register_tokens=0, **WITHOUT_CLS, pooler_type="mean")
    for kind in ("cls", "register_mean"):
        with pytest.raises(ValueError, match=f"tiny has no tokens for '{kind}' features. Choose among .*patch_mean"):
            run(encoder, pictures(), spec=FeatureSpec(kinds=(kind,)))
    with pytest.raises(ValueError, match="normalizes its images with is not known"):
        run(VisionEncoder.wrap(encoder.model), pictures(), spec=FeatureSpec(kinds=("patch_mean",)))
    with pytest.raises(ValueError, match="batch size must be 1 or more"):
        run(encoder, pictures(), batch_size=0)
    with pytest.raises(ValueError, match="on_bad_image must be among raise, skip"):
        run(encoder, pictures(), on_bad_image="ignore")


# Streams and processes


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    labels = ["ant", "zebra", "zebra", "ant", "emu"]
    feature = datasets.ClassLabel(names=["zebra", "ant", "emu"])
    (tmp_path / "fish").mkdir()
    write_parquet(tmp_path / "fish" / "train-0.parquet", labels, feature)
    write_parquet(tmp_path / "fish" / "train-1.parquet", [*labels, "ant", "emu", "ant"], feature)
    return tmp_path / "fish"


def test_a_stream_has_the_features_of_what_is_mapped(encoder, parquet, tmp_path):
    mapped = run(encoder, load_image_data(parquet, "train"), tmp_path / "mapped")
    stream = load_image_data(parquet, "train", streaming=True)
    streamed = run(encoder, stream, tmp_path / "streamed")
    for features in (streamed, run(encoder, stream, tmp_path / "streamed")):
        assert all(torch.equal(features[kind].tensor(), mapped[kind].tensor()) for kind in KINDS)
        assert features.labels.tolist() == mapped.labels.tolist()
        assert features.names == mapped.names and features.class_names == mapped.class_names
        assert features.folder == streamed.folder


def test_a_finished_stream_is_not_read_again(encoder, parquet, tmp_path, monkeypatch):
    stream = load_image_data(parquet, "train", streaming=True)
    first = run(encoder, stream, tmp_path)
    decoded = []
    monkeypatch.setattr(extraction, "decode", lambda content, name: decoded.append(name) or decode(content, name))
    monkeypatch.setattr(type(stream), "__iter__", lambda self: pytest.fail("read again"))
    assert len(run(encoder, stream, tmp_path)) == 13
    monkeypatch.undo()
    monkeypatch.setattr(extraction, "decode", lambda content, name: decoded.append(name) or decode(content, name))
    (first.folder / "shard-000001.safetensors").unlink()
    again = run(encoder, load_image_data(parquet, "train", streaming=True), tmp_path)
    assert decoded == first.names[5:10], "what is there is skipped without decoding"
    assert torch.equal(again["cls"].tensor(), first["cls"].tensor())
    other = run(encoder, load_image_data(parquet, "train", streaming=True, max_images=11), tmp_path)
    assert len(other) == 11 and other.folder != first.folder


def test_progress_tells_images_per_second(encoder, capsys):
    run(encoder, pictures(), progress=True).close()
    assert "13/13" in (shown := capsys.readouterr().err) and "images/s" in shown
    run(encoder, pictures()).close()
    assert capsys.readouterr().err == ""


EXTRACT_TOGETHER = """
import sys, warnings
sys.path[:0] = ["tests"]
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
import test_evaluation_extraction as test
from hf_vitreg.data import image_data
from hf_vitreg.data.labelled_images import load_image_data

torch.set_num_threads(1)
folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
rank = accelerator.process_index
data, encoder = test.pictures(), test.make_encoder()
kept = test.run(encoder, data, folder / "kept", accelerator=accelerator)
stream = load_image_data(folder / "fish", "train", streaming=True)
streamed = test.run(encoder, stream, folder / "streamed", accelerator=accelerator)
with test.run(encoder, data, accelerator=accelerator) as temporary:
    values = {f"temporary {kind}": temporary[kind].tensor() for kind in test.KINDS}
accelerator.wait_for_everyone()
values |= {f"kept {kind}": kept[kind].tensor() for kind in test.KINDS}
values |= {f"streamed {kind}": streamed[kind].tensor() for kind in test.KINDS}
values |= {"decoded": torch.tensor(data.decoded), "labels": streamed.labels}
save_file(values, folder / f"{rank}.safetensors")
(folder / f"{rank}.txt").write_text(f"{accelerator.num_processes} {kept.folder.name} {temporary.folder.exists()}")
try:
    test.run(test.make_encoder(seed=rank), data, folder / "kept", accelerator=accelerator)
except ValueError as error:
    (folder / f"{rank}.error").write_text(str(error))
accelerator.end_training()
"""


@pytest.mark.slow  # test_evaluation_evaluate.py has two, too
def test_two_processes_give_the_same_to_the_last_bit(encoder, finished, parquet, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "together.py").write_text(EXTRACT_TOGETHER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "together.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    streamed = run(encoder, load_image_data(parquet, "train"), tmp_path / "mapped")
    decoded = []
    for rank in (0, 1):
        values = load_file(tmp_path / f"{rank}.safetensors")
        for kind in KINDS:
            assert torch.equal(values[f"kept {kind}"], finished[kind].tensor()), kind
            assert torch.equal(values[f"temporary {kind}"], finished[kind].tensor()), kind
            assert torch.equal(values[f"streamed {kind}"], streamed[kind].tensor()), kind
        assert values["labels"].tolist() == streamed.labels.tolist()
        assert (tmp_path / f"{rank}.txt").read_text() == f"2 {finished.folder.name} False"
        assert "2 processes do not hold the same model" in (tmp_path / f"{rank}.error").read_text()
        decoded.append(sorted(values["decoded"].tolist()))
    # once for what is kept and once for what is temporary
    assert decoded[0] == sorted([*range(5), *range(10, 13)] * 2) and decoded[1] == sorted([*range(5, 10)] * 2)

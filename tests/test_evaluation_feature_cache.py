# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import functools
import json

import pytest
import torch
from reference import VARIANTS, images, randomize, tiny_config
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from transformers import DINOv3ViTConfig, DINOv3ViTModel, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from hf_vitreg import ViTRegModel
from hf_vitreg.evaluation.feature_cache import FeatureCache, MappedTensor, Shard, encoder_key
from hf_vitreg.features import VisionEncoder


HEIGHT, WIDTH = 21, 49
TIMM = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 7, "img_size": (HEIGHT, WIDTH), "num_classes": 0}
TRANSFORMERS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
TRANSFORMERS |= {"patch_size": 7, "image_size": 21}
FAMILIES = {
    "vitreg": lambda: ViTRegModel(tiny_config()),
    "vitreg rope": lambda: ViTRegModel(tiny_config(**VARIANTS["rope"])),
    "vit": lambda: ViTModel(ViTConfig(**TRANSFORMERS)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**TRANSFORMERS)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**TRANSFORMERS)),
    "timm vit": functools.partial(VisionTransformer, dynamic_img_size=True, **TIMM),
    "timm eva": functools.partial(Eva, dynamic_img_size=True, use_rot_pos_emb=True, **TIMM),
}


def wrap(make, seed=0):
    torch.manual_seed(seed)
    return VisionEncoder.wrap(make())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_of_a_model_is_the_same_whatever_it_was_used_for(family):
    encoder = wrap(FAMILIES[family])
    before = encoder_key(encoder)
    assert json.loads(json.dumps(before))
    side = 21 if family in ("vit", "siglip", "dinov3") else WIDTH
    encoder.layers(images(HEIGHT, side), [-1])
    encoder.model(images(HEIGHT, side), **({} if "timm" in family else {"output_hidden_states": True}))
    assert encoder_key(encoder) == before == encoder_key(wrap(FAMILIES[family]))
    assert encoder_key(wrap(FAMILIES[family], seed=1)) != before


def test_the_key_is_of_all_that_the_forward_pass_depends_on():
    def key(**changes):
        return encoder_key(VisionEncoder.wrap(randomize(ViTRegModel(tiny_config(**changes)))))

    before = key()
    assert key() == before == key(id2label={0: "cat"}), "names of classes are none of it"
    for change in (
        {"layer_norm_eps": 1e-3},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"num_attention_heads": 4},
        {"position_embedding_type": "patches"},
    ):
        assert key(**change) != before, change


def test_the_key_sees_what_a_timm_model_does_not_say_of_itself():
    encoder = wrap(FAMILIES["timm vit"])
    before = encoder_key(encoder)
    encoder.model.blocks[1].norm1.eps = 1e-3
    changed = encoder_key(encoder)
    encoder.model.blocks[1].attn.scale *= 2
    assert len({before["settings"], changed["settings"], encoder_key(encoder)["settings"]}) == 3


def test_weights_in_another_dtype_are_other_weights():
    encoder = wrap(FAMILIES["vitreg"])
    before = encoder_key(encoder)
    encoder.model.to(torch.bfloat16)
    assert encoder_key(encoder) != before


def test_a_hook_cannot_be_told_by_a_hash():
    encoder = wrap(FAMILIES["vitreg"])
    with (
        encoder.replace_registers(torch.zeros(5, encoder.hidden_size)),
        pytest.raises(ValueError, match=r"a hook on encoder\.layer\.0 .* cache_dir=None"),
    ):
        encoder_key(encoder)
    assert encoder_key(encoder)


WHOLE = torch.arange(11 * 2 * 3).reshape(11, 2, 3).float()


@pytest.fixture
def mapped():
    return MappedTensor(WHOLE.split([4, 1, 5, 1]))


def test_a_mapped_tensor_is_the_whole_tensor(mapped):
    assert (len(mapped), mapped.shape, mapped.dtype) == (11, WHOLE.shape, torch.float32)
    assert torch.equal(mapped.tensor(), WHOLE)
    assert [batch.shape[0] for batch in mapped.batches(4)] == [4, 4, 3]
    assert torch.equal(torch.cat(list(mapped.batches(4))), WHOLE)
    assert torch.equal(torch.stack(list(mapped)), WHOLE)
    assert "shape=(11, 2, 3)" in repr(mapped)


@pytest.mark.parametrize("bounds", [(0, 4), (3, 11), (None, None), (5, 5), (7, 3), (-4, -1), (2, 99), (None, None, 3)])
def test_a_slice_of_a_mapped_tensor(mapped, bounds):
    assert torch.equal(mapped[slice(*bounds)], WHOLE[slice(*bounds)])


def test_a_slice_within_one_file_is_no_copy(mapped):
    assert mapped[5:9].data_ptr() == mapped.parts[2].data_ptr()


def test_rows_of_a_mapped_tensor(mapped):
    assert torch.equal(mapped[4], WHOLE[4]) and torch.equal(mapped[-1], WHOLE[-1])
    for index in ([10, 0, 4, 4, 3], torch.tensor([9, -1]), torch.arange(11) % 3 == 0, []):
        expected = torch.as_tensor(index) if len(index) else torch.zeros(0, dtype=torch.long)
        assert torch.equal(mapped[index], WHOLE[expected])
    assert torch.equal(mapped[::-1], WHOLE.flip(0))
    for index in (11, -12):
        with pytest.raises(IndexError, match=f"Row {index} does not exist: there are 11"):
            mapped[index]
    with pytest.raises(IndexError, match="Row 11 does not exist"):
        mapped[[3, 11]]


def shard(number=3):
    return Shard(number, {"cls": WHOLE.clone(), "indices": torch.arange(11)}, {7: "b.png is bad"}, 12)


def test_a_shard_comes_back_as_it_was_written(tmp_path):
    cache = FeatureCache(tmp_path, {"model": "a"})
    assert not cache.has(3)
    cache.write(shard())
    read = cache.read(3)
    assert cache.has(3) and (read.number, read.left_out, read.num_images) == (3, {7: "b.png is bad"}, 12)
    assert torch.equal(read.tensors["cls"], WHOLE)
    assert cache.folder.parent == tmp_path and cache.key.startswith(cache.folder.name)
    assert FeatureCache(tmp_path, {"model": "b"}).folder != cache.folder


def test_a_shard_that_is_not_whole_is_named(tmp_path):
    cache = FeatureCache(tmp_path, {"model": "a"})
    cache.write(shard())
    whole = cache.path(3).read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 9, 0):
        cache.path(3).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"shard-000003\.safetensors are cut short .* Delete .*shard-000003"):
            cache.has(3)


def test_a_shard_of_something_else_is_named(tmp_path):
    cache, other = FeatureCache(tmp_path, {"model": "a"}), FeatureCache(tmp_path, {"model": "b"})
    other.write(shard())
    cache.folder.mkdir()
    other.path(3).rename(cache.path(3))
    with pytest.raises(ValueError, match=r"shard-000003\.safetensors are of another model, preprocessing or data"):
        cache.read(3)
    cache.write(shard())
    cache.path(3).rename(cache.path(2))
    with pytest.raises(ValueError, match=r"shard-000002\.safetensors are those of shard 3\. Delete"):
        cache.read(2)
    with pytest.raises(ValueError, match=r"shard-000003\.safetensors are not there\. Several machines must share"):
        cache.read(3)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, {"model": "a"})

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_vitreg.evaluation.feature_cache.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        cache.write(shard())
    assert list(cache.folder.iterdir()) == [] and not cache.has(3)


def test_the_manifest(tmp_path):
    cache = FeatureCache(tmp_path, {"layers": (1, 2)})
    assert cache.num_images() is None and not cache.has_manifest()
    cache.write_manifest({"data": "birds", "num_images": 13})
    assert cache.num_images() == 13 and cache.has_manifest()
    path = cache.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert (manifest["data"], manifest["features"]["layers"], manifest["key"]) == ("birds", [1, 2], cache.key)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: .* Delete"):
        cache.num_images()
    path.write_text(json.dumps({**manifest, "key": "0"}))
    with pytest.raises(ValueError, match=r"manifest\.json is that of other features"):
        cache.has_manifest()

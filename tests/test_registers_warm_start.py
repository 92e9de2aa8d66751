# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
from reference import HEIGHT, VARIANTS, WIDTH, randomize, tiny_config

from hf_vitreg import ViTRegForImageClassification, ViTRegModel
from hf_vitreg.registers.warm_start import add_registers


NUM_NEW, STD = 7, 0.3
WITHOUT = {"num_register_tokens": 0}


def tiny(variant, model_class=ViTRegModel, **overrides):
    return randomize(model_class(tiny_config(**{**VARIANTS.get(variant, {}), **WITHOUT, **overrides})))


def images() -> torch.Tensor:
    return torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_everything_but_the_registers_is_the_same(variant):
    model = tiny(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more = add_registers(model, NUM_NEW, STD)
    after = more.state_dict()
    assert after.keys() - before.keys() == {"embeddings.register_tokens"} and before.keys() <= after.keys()
    for name, tensor in before.items():
        new = after[name]
        if name == "embeddings.position_embeddings" and model.config.position_embedding_type == "prefix_patches":
            index = model.config.num_prefix_tokens
            assert not new[:, index : index + NUM_NEW].any()
            new = torch.cat([new[:, :index], new[:, index + NUM_NEW :]], dim=1)
        assert torch.equal(new, tensor), name
    assert model.config.num_register_tokens == 0 and model.embeddings.register_tokens is None


@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_the_model_is_the_one_that_its_config_makes(variant, tmp_path):
    more = add_registers(tiny(variant), NUM_NEW, STD).eval()
    assert more.config.num_register_tokens == NUM_NEW and more.config.register_init_std == STD
    more.save_pretrained(tmp_path)
    loaded, report = ViTRegModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        outputs = more(images())
        assert torch.equal(outputs.last_hidden_state, loaded.eval()(images()).last_hidden_state)
    assert outputs.register_tokens.shape[1] == NUM_NEW


@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_the_first_layer_gets_what_it_got_and_the_registers(variant):
    model = tiny(variant).eval()
    more = add_registers(model, NUM_NEW, STD).eval()
    with torch.no_grad():
        before, after = model.embeddings(images()), more.embeddings(images())
    registers = after[:, more.config.register_slice]
    index = more.config.register_slice.start
    assert torch.equal(torch.cat([after[:, :index], after[:, index + NUM_NEW :]], dim=1), before)
    if not model.config.use_pre_layernorm:
        assert torch.equal(registers, more.embeddings.register_tokens.expand(2, -1, -1))


def test_registers_are_normal_and_apart():
    torch.manual_seed(7)
    more = add_registers(tiny("default", hidden_size=480), 31, STD)
    registers = more.embeddings.register_tokens
    assert registers.shape == (1, 31, 480) and registers.requires_grad
    assert registers.std().item() == pytest.approx(STD, rel=0.05)
    assert abs(registers.mean().item()) < 0.01
    assert len(registers[0].unique(dim=0)) == 31


def test_no_registers_is_the_same_model():
    model = tiny("default").eval()
    same = add_registers(model, 0, STD)
    with torch.no_grad():
        assert torch.equal(same(images()).last_hidden_state, model(images()).last_hidden_state)
    assert same is not model and same.config.num_register_tokens == 0


def test_a_classifier_keeps_its_head_and_learns():
    model = tiny("default", ViTRegForImageClassification).to(torch.bfloat16)
    more = add_registers(model, NUM_NEW, STD)
    assert more.vitreg.embeddings.register_tokens.dtype == torch.bfloat16
    assert torch.equal(more.classifier.weight, model.classifier.weight)
    more(images().to(torch.bfloat16)).logits.sum().backward()
    assert more.vitreg.embeddings.register_tokens.grad.any()


@pytest.mark.parametrize(
    ("present", "number", "std", "named"),
    [
        (5, 3, STD, "has 5 registers already"),
        (0, -1, STD, "got num_register_tokens=-1"),
        (0, 3, 0.0, "init_std=0.0"),
    ],
)
def test_what_makes_no_sense_is_refused(present, number, std, named):
    with pytest.raises(ValueError, match=named):
        add_registers(tiny("default", num_register_tokens=present), number, std)

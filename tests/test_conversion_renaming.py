# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import weakref
from collections.abc import Mapping

import pytest
import torch

from conversion.family import ConversionError
from conversion.renaming import rename, restore


RULES = {
    "cls": "embeddings.cls_token",
    "blocks.[{chunk}.]{layer}.qkv.{param}": tuple(f"layer.{{layer}}.{part}.{{param}}" for part in "qkv"),
}


def targets(num_layers=2):
    shapes = {f"layer.{layer}.{part}.weight": torch.Size([3, 5]) for layer in range(num_layers) for part in "qkv"}
    return {"embeddings.cls_token": torch.Size([1, 7])} | shapes


def tensors(num_layers=2):
    return {"cls": torch.ones(1, 7)} | {f"blocks.{layer}.qkv.weight": torch.randn(9, 5) for layer in range(num_layers)}


def test_fused_tensors_are_split_in_order_and_without_copies():
    old = tensors()
    new = rename(old, RULES, targets())
    assert new.keys() == targets().keys()
    qkv = old["blocks.1.qkv.weight"]
    for index, part in enumerate("qkv"):
        view = new[f"layer.1.{part}.weight"]
        assert torch.equal(view, qkv[3 * index : 3 * index + 3])
        assert view.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert view.is_contiguous()


def test_the_number_in_brackets_may_be_there_or_not():
    old = tensors(num_layers=12)
    chunked = {name.replace("blocks.11.", "blocks.3.11."): tensor for name, tensor in old.items()}
    assert chunked.keys() != old.keys()
    plain, moved = rename(old, RULES, targets(12)), rename(chunked, RULES, targets(12))
    assert all(torch.equal(plain[name], moved[name]) for name in plain)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"rope.periods": torch.ones(2)}, "1 tensors that the model does not have: rope.periods"),
        ({"blocks.2.qkv.weight": torch.ones(9, 5)}, "1 tensors that the model does not have: blocks.2.qkv.weight"),
        ({"blocks.0.qkv.gain": torch.ones(9, 5)}, "1 tensors that the model does not have: blocks.0.qkv.gain"),
        ({"blocks.0.qkv.weight": None}, "1 tensors that are missing: blocks.0.qkv.weight"),
        ({"cls": None}, "1 tensors that are missing: cls"),
        ({"cls": torch.ones(7)}, r"cls gives \(7,\) to embeddings.cls_token, which takes \(1, 7\)"),
        ({"cls": torch.tensor(1.0)}, r"cls gives \(\) to embeddings.cls_token"),
        ({"blocks.1.qkv.weight": torch.ones(10, 5)}, r"blocks.1.qkv.weight gives \(10, 5\) to layer.1.q.weight"),
        (
            {"blocks.0.1.qkv.weight": torch.ones(9, 5)},
            "1 tensors that claim the same place: blocks.0.1.qkv.weight and ",
        ),
    ],
)
def test_everything_that_does_not_add_up_is_named(change, expected):
    old = {name: tensor for name, tensor in (tensors() | change).items() if tensor is not None}
    with pytest.raises(ConversionError, match=expected):
        rename(old, RULES, targets())


def test_all_complaints_come_together_and_long_lists_are_cut():
    old = {f"unknown.{index}": torch.ones(1) for index in range(11)} | {"cls": torch.ones(1, 8)}
    with pytest.raises(ConversionError) as error:
        rename(old, RULES, targets())
    assert "11 tensors that the model does not have: unknown.0" in str(error.value)
    assert "unknown.7 and 3 more" in str(error.value)
    assert "1 shapes that do not fit" in str(error.value)
    assert "2 tensors that are missing: blocks.0.qkv.weight, blocks.1.qkv.weight" in str(error.value)


def test_two_rules_for_one_tensor_are_our_mistake():
    with pytest.raises(AssertionError, match="2 rules claim cls"):
        rename({"cls": torch.ones(1, 7)}, {"cls": "a", "[x]cls": "b"}, {})


def test_restore_is_the_inverse_of_rename():
    old = tensors(num_layers=12)
    back = restore(rename(old, RULES, targets(12)), RULES)
    assert list(back) == list(old)
    assert all(torch.equal(back[name], old[name]) for name in old)
    # what is not joined is not copied
    assert back["cls"].data_ptr() == old["cls"].data_ptr()


def test_a_part_that_was_dropped_comes_back_as_zeros():
    rules = {"qkv.{param}": ("q.{param}", None, "v.{param}")}
    back = restore({"v.bias": torch.full([3], 5.0), "q.bias": torch.full([3], 2.0)}, rules)
    assert torch.equal(back["qkv.bias"], torch.tensor([2.0] * 3 + [0.0] * 3 + [5.0] * 3))


def test_of_several_old_names_the_first_with_all_its_parts_is_taken():
    rules = {"kv": ("k", "v"), "k_alone": "k", "also_k": "k", "v_alone": "v"}
    assert list(restore({"k": torch.ones(2), "v": torch.ones(2)}, rules)) == ["kv"]
    assert list(restore({"k": torch.ones(2)}, rules)) == ["k_alone"]


def test_what_the_old_layout_cannot_hold_is_named():
    new = rename(tensors(), RULES, targets()) | {"periods": torch.ones(2)}
    del new["layer.1.k.weight"]
    with pytest.raises(ConversionError) as error:
        restore(new, RULES)
    assert "1 tensors have no place there: periods" in str(error.value)
    assert "2 tensors lack the rest of theirs: layer.1.q.weight without layer.1.k.weight" in str(error.value)


def test_a_file_is_asked_for_one_tensor_at_a_time():
    """What `restore` holds beside its result is one group of parts, whatever the size of the file."""
    alive = weakref.WeakSet()

    class File(Mapping):
        def __init__(self, content):
            self.content = content

        def __iter__(self):
            return iter(self.content)

        def __len__(self):
            return len(self.content)

        def __contains__(self, name):
            return name in self.content

        def __getitem__(self, name):
            assert len(alive) < 3, "read before the parts of another tensor were joined"
            tensor = self.content[name].clone()
            alive.add(tensor)
            return tensor

    new = rename(tensors(7), RULES, targets(7))
    del new["embeddings.cls_token"]
    assert len(restore(File(new), RULES)) == 7

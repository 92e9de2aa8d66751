# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import datasets
import pytest

from hf_vitreg.data.columns import choose_column, could_be


FEATURES = {
    "picture": datasets.Image(),
    "title": datasets.Value("large_string"),
    "text": datasets.Value("string"),
    "class": datasets.ClassLabel(names=["a", "b"]),
    "height": datasets.Value("int32"),
}


def choose(what, given=None, usual=(), kind=datasets.Image):
    return choose_column(FEATURES, what, given, usual, kind, f"--{what}_column", "The table")


def test_a_column_is_the_given_one_the_usual_one_or_the_only_one_of_its_kind():
    assert choose("image") == "picture"
    assert choose("label", kind=datasets.ClassLabel) == "class"
    assert choose("caption", usual=["caption", "text"], kind="string") == "text"
    assert choose("caption", given="title", usual=["caption", "text"], kind="string") == "title"
    assert choose("label", usual=["height"], kind=datasets.ClassLabel) == "height"


def test_a_column_that_is_not_clear_is_asked_for():
    others = "picture, title, text, class, height"
    with pytest.raises(
        ValueError, match=f"The table has 2 columns of captions.*set --caption_column to one of {others}"
    ):
        choose("caption", kind="string")
    with pytest.raises(ValueError, match="The table has no columns of images"):
        choose("image", kind=datasets.Audio)
    with pytest.raises(ValueError, match=r"The table has no column 'photo'.*--image_column"):
        choose("image", given="photo")


def test_what_could_be_a_column_is_chosen():
    assert could_be(FEATURES, [], datasets.ClassLabel) and could_be(FEATURES, [], "int")
    assert not could_be(FEATURES, ["caption"], "string") and could_be(FEATURES, ["text"], "string")

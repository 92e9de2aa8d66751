# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import dataclasses
from pathlib import Path

import pytest
import yaml

from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.recipe import FinetuneRecipe, parse_recipe, recipe_yaml, save_recipe


def parse(*arguments):
    return parse_recipe(FinetuneRecipe, [str(argument) for argument in arguments])


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_no_flags_give_the_defaults():
    assert parse() == FinetuneRecipe()


@pytest.mark.parametrize("flag_first", [True, False])
def test_flag_overrides_recipe_overrides_default_in_any_order(tmp_path, flag_first):
    config = ["--config", write(tmp_path / "recipe.yaml", learning_rate=0.5, seed=7)]
    flag = ["--learning_rate", 0.25]
    recipe = parse(*(flag + config if flag_first else config + flag))
    assert (recipe.learning_rate, recipe.seed) == (0.25, 7)
    assert recipe.weight_decay == FinetuneRecipe().weight_decay


@pytest.mark.parametrize(
    "arguments", [["--freeze_backbone"], ["--freeze_backbone", "True"], ["--freeze_backbone=true"]]
)
def test_a_switch_needs_no_value(arguments):
    recipe = parse(*arguments, "--seed", 3)
    assert recipe.freeze_backbone and recipe.seed == 3


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = parse("--train_dir", "some where", "--max_steps", 5, "--freeze_backbone", "--learning_rate", "3e-4")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert parse("--config", tmp_path / "recipe.yaml") == recipe
    assert list(yaml.safe_load(recipe_yaml(recipe))) == [field.name for field in dataclasses.fields(recipe)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learnig_rate", 1], "learning_rate"),
        (["--traindir=x"], "train_dir"),
        (["--batch_size", 3], "per_device_train_batch_size"),
        (["--eval-steps", 3], "`eval_steps`"),
        (["--model", "x"], "`model_name_or_path`"),
        (["--zzz", 3], "--help"),
    ],
)
def test_an_unknown_flag_names_the_nearest(arguments, expected):
    with pytest.raises(ValueError, match=arguments[0].split("=")[0]) as error:
        parse(*arguments)
    assert expected in str(error.value)


def test_an_unknown_recipe_key_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="Did you mean `num_train_epochs`"):
        parse("--config", write(tmp_path / "recipe.yaml", num_train_epoch=3))


def test_a_missing_recipe_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--learning_rate", "fast"], ["learning_rate", "fast"]),
        (["--on_bad_image", "ignore"], ["on_bad_image", "raise", "skip"]),
        (["--rand_augment_magnitude", 31], ["rand_augment_magnitude", "between 0 and 30"]),
        (["--horizontal_flip", 1.5], ["horizontal_flip", "between 0 and 1", "1.5"]),
        (["--max_steps", 0], ["max_steps", "at least 1"]),
        (["--train_dir", "a", "--train_file", "b"], ["train_dir", "train_file"]),
        (["--validation_dir", "a"], ["validation_dir", "train_dir"]),
        (["--push_to_hub"], ["hub_model_id"]),
    ],
)
def test_a_bad_value_says_what_is_allowed(arguments, named):
    with pytest.raises(ValueError) as error:
        parse(*arguments)
    assert all(word in str(error.value) for word in named)


HOUSE = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted(set(HOUSE.rglob("*.yaml")) - set(HOUSE.glob("accelerate/*"))), ids=str)
def test_every_recipe_of_the_house_parses_and_says_how_it_is_run(path):
    parse_recipe(
        PretrainRecipe if "pretrain" in str(path.relative_to(HOUSE)) else FinetuneRecipe, ["--config", str(path)]
    )
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("accelerate launch" in line for line in header)


@pytest.mark.parametrize("recipe_class", [FinetuneRecipe, PretrainRecipe])
def test_every_flag_has_a_sentence_of_help(capsys, recipe_class):
    with pytest.raises(SystemExit):
        parse_recipe(recipe_class, ["--help"])
    text = capsys.readouterr().out
    documented = "".join(group.__doc__ for group in recipe_class.__bases__)
    for field in dataclasses.fields(recipe_class):
        assert f"--{field.name} " in text
        assert f"\n        {field.name}: " in documented

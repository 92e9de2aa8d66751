# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""`hf-vitreg benchmark`. Nothing is compiled here, but in the slow test; no time is asserted anywhere."""

import copy
import inspect
import json

import pytest
import torch
from reference import HEIGHT, PATCH_SIZE, WIDTH, randomize, tiny_config
from typer.testing import CliRunner

from hf_vitreg import ViTRegForImageClassification, ViTRegModel, cli
from hf_vitreg.analysis.cost import forward_flops
from hf_vitreg.data.transforms import new_image_processor
from hf_vitreg.deployment import benchmark, matmul_limit, speed
from hf_vitreg.deployment.benchmark import BenchmarkOptions, benchmark_model


QUICK = {"size": (HEIGHT, WIDTH), "batch_size": 2, "rounds": 2}


def make(model_class=ViTRegModel):
    return randomize(model_class(tiny_config(num_hidden_layers=2)))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small products, and models that are as fast as ever."""
    monkeypatch.setattr(matmul_limit, "CPU_SHAPES", ((29, 48, 17),))
    monkeypatch.setattr(speed, "PRODUCT_SECONDS", 1e-6)
    monkeypatch.setattr(benchmark, "optimize", lambda model, dtype, example: copy.deepcopy(model).to(dtype))
    monkeypatch.setattr(benchmark, "quantize", lambda model, example: copy.deepcopy(model).to(torch.bfloat16))


@pytest.mark.parametrize("model_class", [ViTRegModel, ViTRegForImageClassification])
def test_every_way_has_its_speed(model_class, tmp_path, capsys):
    model = make(model_class)
    done = benchmark_model(model, BenchmarkOptions(**QUICK))
    assert list(done.rows) == ["plain", "optimize, float32", "optimize, bfloat16", "quantize, int8"]
    assert not done.has_errors and set(done.limits) == {"float32", "bfloat16", "int8"}
    assert done.rows["plain"].speed.times_faster == 1 and done.rows["plain"].agreement.relative_error == 0
    assert done.gflops_per_image == forward_flops(model, (HEIGHT, WIDTH)) / 1e9
    done.show()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("torch", "matmul limit, int8: ", "21x49 pixels, batch 2", "0.9999"))
    assert "…" not in printed, "it fits a terminal of 80 columns"
    done.write(tmp_path / "speed.json")
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["rows"]["quantize, int8"]["dtype"] == "int8"
    assert record["rows"]["plain"]["fraction_of_limit"] == done.rows["plain"].speed.fraction_of_limit


def test_what_is_not_the_model_or_cannot_be_made_has_no_time(monkeypatch, capsys):
    def refuse(model, example):
        raise ValueError("This device has no [int8].")

    monkeypatch.setattr(benchmark, "optimize", lambda model, dtype, example: randomize(copy.deepcopy(model), seed=1))
    monkeypatch.setattr(benchmark, "quantize", refuse)
    done = benchmark_model(make(), BenchmarkOptions(**QUICK, dtype=("bfloat16", "int8")))
    assert done.has_errors and done.rows["plain"].speed is not None
    wrong, missing = done.rows["optimize, bfloat16"], done.rows["quantize, int8"]
    assert wrong.speed is missing.speed is None
    assert wrong.error.endswith("where a cosine of 0.9999 or more is needed") and wrong.agreement.cosine < 0.99
    assert missing.error == "This device has no [int8]." and missing.agreement is None
    done.show()
    assert "This device has no [int8]." in " ".join(capsys.readouterr().out.split())


def test_plain_is_what_was_saved_and_compared_with_float32():
    model = make().to(torch.bfloat16)
    done = benchmark_model(model, BenchmarkOptions(**QUICK, dtype=("float32",)))
    plain = done.rows["plain"]
    assert plain.dtype == torch.bfloat16 and 0.999 < plain.agreement.cosine < 1
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": ("float32", "fp4")}, "dtype must be among float32, bfloat16, int8, got 'fp4'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"rounds": 1}, "rounds must be 2 or more, got 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkOptions(**options)


@pytest.mark.parametrize(("size", "nearest"), [((20, 49), "21x49"), ((0, 3), "7x7")])
def test_sizes_without_whole_patches_are_refused(size, nearest):
    with pytest.raises(
        ValueError, match=f"patch size of {PATCH_SIZE}, got {size[0]}x{size[1]}. The nearest is {nearest}"
    ):
        benchmark_model(make(), BenchmarkOptions(size=size))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["benchmark", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    make(ViTRegForImageClassification).save_pretrained(tmp_path / "model")
    new_image_processor(WIDTH).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command_has_an_option_for_every_setting_with_its_default():
    defaults = {name: each.default for name, each in inspect.signature(cli.benchmark).parameters.items()}
    written = {"size": cli._size(defaults["size"]), "dtype": cli._words(defaults["dtype"])}
    numbers = {name: defaults[name] for name in ("batch_size", "rounds")}
    assert {**written, **numbers} == vars(BenchmarkOptions())


def test_command_prints_the_table_and_writes_the_numbers(folder, tmp_path, monkeypatch):
    flags = f"--size {HEIGHT}x{WIDTH} --batch-size 2 --rounds 2 --device cpu --json {tmp_path / 's.json'}".split()
    done = run(folder, *flags)
    assert done.exit_code == 0, done.output
    assert "cosine" in done.stdout and len(json.loads((tmp_path / "s.json").read_text())["rows"]) == 4
    monkeypatch.setattr(benchmark, "optimize", lambda model, dtype, example: randomize(copy.deepcopy(model), seed=1))
    done = run(folder, *flags, "--dtype", "float32", "--overwrite")
    assert done.exit_code == 1 and "optimize, float32 has no time: relative error" in done.stdout
    assert list(json.loads((tmp_path / "s.json").read_text())["rows"]) == ["plain", "optimize, float32"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--size", "20"), "Error: Height and width must be multiples of the patch size of 7, got 20x20"),
        (("--dtype", "fp4"), "Error: dtype must be among float32, bfloat16, int8, got 'fp4'."),
        (("--json", "DIR"), "Error: There is {} already."),
        (("--json", "DIR/gone/s.json"), "Error: There is no folder {}/gone to write s.json to."),
        (("--device", "tpu7"), "Error: There is no device 'tpu7' here"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(folder, tmp_path, flags, message):
    done = run(folder, *(flag.replace("DIR", str(tmp_path)) for flag in flags))
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(message.format(tmp_path))


@pytest.mark.slow
def test_compiled_models_are_the_model(monkeypatch):
    from hf_vitreg.deployment.optimize import optimize
    from hf_vitreg.deployment.quantize import quantize

    monkeypatch.setattr(benchmark, "optimize", optimize)
    monkeypatch.setattr(benchmark, "quantize", quantize)
    done = benchmark_model(make(), BenchmarkOptions(**QUICK))
    assert not done.has_errors and all(row.speed for row in done.rows.values())

# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Who may import whom. The table is the rule; modules that do not exist yet are in it already."""

import ast
import subprocess
import sys
import textwrap
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parent.parent
PACKAGE = "hf_vitreg"
MODEL = {"configuration_vitreg", "modeling_vitreg"}
METHOD = {
    *MODEL,
    "objective_options",
    "objectives.averaging",
    "objectives.base",
    "objectives.heads",
    "objectives.losses",
    "objectives.packing",
    "training.schedules",
    "distributed",
}
TOOL = {*MODEL, "features", "data", "metrics", "distributed", "atomic", "machine"}
# what the modules of a unit may import of the package, beside each other
ALLOWED = {
    "configuration_vitreg": set(),
    "modeling_vitreg": {"configuration_vitreg"},
    "original_layouts": set(),
    "__init__": {*MODEL, "original_layouts"},
    "recipe": set(),
    "objective_options": set(),
    "pretrain_recipe": {"recipe", "objective_options"},
    "distributed": set(),
    "atomic": set(),
    "machine": {"distributed"},
    "matmul": {"machine"},
    "data": {"recipe", "pretrain_recipe", "objective_options", "distributed"},
    "metrics": {"recipe", "distributed"},
    "training": {"recipe", "pretrain_recipe", "objective_options", "distributed", "machine", "training.schedules"},
    # functions of a step, which losses have schedules of too
    "training.schedules": set(),
    # and views of a batch, that a teacher is averaged over
    "registers.post_hoc": set(),
    "vit_families": set(),
    "features": {*MODEL, "vit_families", "data", "distributed"},
    "teachers": {"features", "data"},
    "objectives": set(),
    "objectives.averaging": set(),
    "objectives.losses": {"recipe", "distributed"},
    "objectives.heads": {"distributed"},
    "objectives.text_towers": {"objective_options"},
    "objectives.packing": {*MODEL, "objectives.recomputed"},
    "objectives.recomputed": MODEL,
    "objectives.base": {*MODEL, "distributed"},
    "objectives.dino": METHOD,
    "objectives.supervised": METHOD,
    "objectives.clip": METHOD,
    "objectives.post_hoc": {*METHOD, "registers.post_hoc"},
    "hub": TOOL,
    "deployment": {*TOOL, "matmul"},
    # features of many images are those that evaluations are made of, of images that an inspection finds too
    "deployment.extract": {*TOOL, "matmul", "evaluation", "deployment", "deployment.image_sources"},
    "deployment.image_sources": {*TOOL, "analysis"},
    # what a model computes is counted where the cost of registers is
    "deployment.benchmark": {*TOOL, "analysis", "deployment"},
    "evaluation": TOOL,
    # what is watched in training is what both of them measure
    "evaluation.monitoring": {*TOOL, "evaluation", "analysis"},
    "analysis": TOOL,
    # what neurons make artifacts is what analysis says is one
    "registers": {*TOOL, "analysis"},
    # a model that got registers is written as a repository, with what its card said
    "registers.source": {*TOOL, "hub"},
    "registers.distill": {*MODEL, "registers", "registers.source"},
    "registers.give": {*TOOL, "analysis", "hub", "registers", "registers.source", "registers.distill"},
}
# puts together what everything below it offers
ALLOWED["pretraining"] = set(ALLOWED)
# the command line may import everything
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["__main__"] = {"cli"}
HUB_FILES = MODEL
HUB_FILE_PACKAGES = {"torch", "transformers", "huggingface_hub"}
# nobody imports these but tests and each other
SCRIPTS = {"finetune", "pretrain", "conversion", "benchmarks"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted names below `root`, a package without its own name as `__init__`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        *parents, stem = path.relative_to(root).with_suffix("").parts
        found[".".join(parents if stem == "__init__" and parents else [*parents, stem])] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> list[str]:
    """Everything that a module imports, anywhere in it: absolute dotted names, names of the package as `.name`."""
    targets = []
    package = [] if name == "__init__" else name.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            targets += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                # a name is a module of its own, or belongs to the module that it is imported from
                dotted = ".".join([*base, alias.name])
                targets.append("." + (dotted if dotted in known else ".".join(base) or "__init__"))
    return targets


def unit(module: str) -> str:
    """The entry of the table that a module belongs to, the longest that fits."""
    parts = module.split(".")
    candidates = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((candidate for candidate in candidates if candidate in ALLOWED), "")


def violations(root: Path) -> list[str]:
    """What the modules below `root` import against the table, one line each."""
    known, found = modules(root), []
    for name, path in known.items():
        if not unit(name):
            found.append(f"{name} is in no unit of the table")
            continue
        for target in imports(name, path, set(known)):
            top = target.split(".")[0]
            if top in {PACKAGE, *SCRIPTS}:
                found.append(f"{name} imports {target}; inside the package imports are relative")
            elif target.startswith(".") and unit(target[1:]) not in ALLOWED[unit(name)] | {unit(name)}:
                found.append(f"{name} imports {target}, which is not below it")
            elif name in HUB_FILES and top and top not in HUB_FILE_PACKAGES | sys.stdlib_module_names:
                found.append(f"{name} imports {top}, which remote code may not need")
    return found


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {
        name: {target[1:] for target in imports(name, path, set(known)) if target.startswith(".")} - {name}
        for name, path in known.items()
    }


def test_imports_go_downwards_only():
    assert violations(REPOSITORY / "src" / PACKAGE) == []


def test_imports_have_no_cycle():
    # raises CycleError, which names the modules
    assert list(TopologicalSorter(graph(REPOSITORY / "src" / PACKAGE)).static_order())


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("modeling_vitreg", "from .recipe import Recipe"),
        ("modeling_vitreg", "import numpy"),
        ("configuration_vitreg", "from .modeling_vitreg import ViTRegModel"),
        ("recipe", "from .data import datasets"),
        ("recipe", "from hf_vitreg import ViTRegConfig"),
        ("recipe", "import hf_vitreg.modeling_vitreg"),
        ("data.datasets", "from ..modeling_vitreg import ViTRegModel"),
        ("data.datasets", "from .. import features"),
        ("data.datasets", "from .. import ViTRegModel"),
        ("training.optim", "def late():\n    from ..objectives.dino import DINO"),
        ("objectives.losses", "from .dino import DINO"),
        ("hub.export", "from ..evaluation.knn import knn"),
        ("hub.export", "from conversion import convert"),
        ("features", "from .cli import app"),
        ("helpers", ""),
    ],
)
def test_the_rule_would_see(tmp_path, module, code):
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    (tmp_path / "features.py").touch()
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("modeling_vitreg", "import math\nfrom torch import nn\nfrom .configuration_vitreg import ViTRegConfig"),
        ("data.datasets", "import numpy\nfrom .transforms import resize\nfrom ..recipe import Recipe"),
        ("objectives.dino", "from .base import Objective\nfrom ..modeling_vitreg import ViTRegModel"),
        ("cli", "from .hub.export import export\nfrom . import __version__"),
    ],
)
def test_the_rule_would_allow(tmp_path, module, code):
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    assert violations(tmp_path) == []


def test_the_rule_would_see_a_cycle(tmp_path):
    (tmp_path / "__init__.py").write_text("from . import one")
    (tmp_path / "one.py").write_text("from .two import two")
    (tmp_path / "two.py").write_text("from .one import one")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph(tmp_path)).static_order())


def test_nothing_is_printed_at_import():
    """Nor logged, nor warned of; what transformers itself prints comes before the line."""
    code = """
        import sys, warnings
        from transformers import PreTrainedModel
        from transformers.models.auto import modeling_auto
        for stream in (sys.stdout, sys.stderr):
            print("-----", file=stream, flush=True)
        warnings.simplefilter("always")
        import hf_vitreg
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.partition("-----\n")[2] == done.stderr.partition("-----\n")[2] == ""


def test_public_names_are_the_model():
    import hf_vitreg

    assert sorted(hf_vitreg.__all__) == [
        "ViTRegBackbone",
        "ViTRegConfig",
        "ViTRegForDepthEstimation",
        "ViTRegForImageClassification",
        "ViTRegForSemanticSegmentation",
        "ViTRegModel",
        "ViTRegPreTrainedModel",
    ]
    assert all(hasattr(hf_vitreg, name) for name in hf_vitreg.__all__)

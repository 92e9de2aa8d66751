# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A report is whole or not there, and says what was measured."""

import base64
import copy
import errno
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from planted import MEAN, NUM_LAYERS, NUM_REGISTERS, PLANTED_LAYER, STD, patchy_image, planted_encoder
from reference import tiny_config
from sample_images import write_folder
from transformers import BertConfig, BitImageProcessor

from hf_vitreg import ViTRegModel
from hf_vitreg.analysis import figures, report, sections
from hf_vitreg.analysis.inspection import inspect


VOID = {"meta", "img", "br", "link", "hr"}


@pytest.fixture(scope="module", autouse=True)
def small_figures():
    """Quickly drawn."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(figures, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def inspections():
    images = [patchy_image(index)[0] for index in range(14)]
    return inspect(planted_encoder(500.0), images), inspect(planted_encoder(1.0, num_registers=0), images)


@pytest.fixture(scope="module")
def written(inspections, tmp_path_factory):
    curve = [{"step": 5, "share": 0.0, "has_artifacts": False}, {"step": 9, "share": 0.06, "has_artifacts": True}]
    folder = tmp_path_factory.mktemp("reports") / "deep" / "both"
    return report.write_report(folder, *inspections, curve=curve)


class Page(HTMLParser):
    """Elements that are closed as they should, words, and what the page would fetch."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.words, self.images, self.fetched, self.captions = [], [], [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            assert attrs["alt"]
            self.images.append(attrs["src"])
        self.fetched += [
            attrs[name] for name in ("src", "href", "srcset") if not attrs.get(name, "data:").startswith("data:")
        ]
        self.captions += tag == "figcaption"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_begins_with_the_verdict_and_what_to_do(written):
    page = Page(written.page)
    assert page.open == []
    beginning = page.text[
        page.text.index("</style>") if "</style>" in page.text else page.text.index("Artifacts: yes.") :
    ]
    assert beginning.startswith("Artifacts: yes. 6.25 % of the patches (21) have a norm above")
    assert f"They stand apart from layer {PLANTED_LAYER} on. What to do next" in beginning
    assert "Artifacts: no. No patch has a norm above" in page.text
    assert f"take dense features after layer {PLANTED_LAYER - 1}" in page.text
    assert f"The model has {NUM_REGISTERS} registers and artifacts all the same" in page.text


def test_page_needs_no_network_and_holds_every_figure(written):
    page = Page(written.page)
    assert page.fetched == [] and "@import" not in page.text and "url(" not in page.text
    files = sorted(path.name for path in written.folder.glob("*.png"))
    on_page = {base64.b64decode(source.partition(",")[2]) for source in page.images}
    assert on_page == {(written.folder / name).read_bytes() for name in files}
    assert "compare_norm_maps.png" in files and "norm_maps.png" in files and "training_curve.png" in files
    assert '<meta name="viewport"' in written.page.read_text() and "@media print" in written.page.read_text()


def test_figures_that_only_the_other_model_has_are_on_the_page(inspections, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: path.write_bytes(path.name.encode()))
    done = report.write_report(tmp_path / "report", *reversed(inspections))
    on_page = {base64.b64decode(source.partition(",")[2]).decode() for source in Page(done.page).images}
    assert on_page == {path.name for path in done.folder.glob("*.png")}
    assert "compare_attention_heads_register_1.png" in on_page


@pytest.mark.slow  # another whole report
def test_attention_of_every_layer_is_folded(tmp_path):
    images = [patchy_image(index)[0] for index in range(5)]
    done = report.write_report(tmp_path / "report", inspect(planted_encoder(500.0), images, all_layers=True))
    page, source = Page(done.page), done.page.read_text(encoding="utf-8")
    assert page.open == [] and len(page.images) == len(list(done.folder.glob("*.png")))
    assert source.count("<details><summary>Attention in layer ") == NUM_LAYERS
    assert "Attention of register 1 in layer 2, head by head." in page.text


def test_metrics_hold_both_models_and_the_curve(written, inspections):
    metrics = json.loads((written.folder / "metrics.json").read_text())
    assert metrics["verdict"] == inspections[0].metrics["verdict"]
    assert metrics["compare"]["verdict"]["has_artifacts"] is False
    assert [row["step"] for row in metrics["training_curve"]] == [5, 9]
    assert written.verdicts[0][0] == "Artifacts: yes." and written.verdicts[1][0] == "Artifacts: no."


def test_one_model_alone_has_the_same_keys(written, inspections, tmp_path):
    alone = report.write_report(tmp_path / "alone", inspections[1])
    metrics, both = (json.loads((each.folder / "metrics.json").read_text()) for each in (alone, written))
    assert list(metrics) == list(both) and metrics["compare"] is metrics["training_curve"] is None
    assert Page(alone.page).open == [] and "Side by side" not in Page(alone.page).text


def test_names_cannot_become_part_of_the_page(inspections, tmp_path):
    result = copy.copy(inspections[1])
    model = result.metrics["model"] | {"name": "<script>alert('&')</script>"}
    unreadable = [{"name": "<img src=x>.png", "reason": "a & b"}]
    images = result.metrics["images"] | {"unreadable": unreadable, "num_unreadable": 1}
    object.__setattr__(result, "metrics", result.metrics | {"model": model, "images": images})
    page = Page(report.write_report(tmp_path / "report", result).page)
    assert "<script>alert('&')</script>" in page.text and "<img src=x>.png a & b" in page.text
    assert page.open == []


@pytest.mark.parametrize("step", ["figure", "page", "rename"])
def test_full_disk_leaves_nothing(inspections, tmp_path, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {"figure": (figures, "save_figure"), "page": (Path, "write_text"), "rename": (Path, "rename")}[step]
    monkeypatch.setattr(figures, "draw_figures", lambda inspection, scales: {"one": None})
    if step != "figure":
        monkeypatch.setattr(figures, "save_figure", lambda figure, path: path.write_bytes(b"png"))
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(tmp_path / "report", inspections[1])
    assert list(tmp_path.iterdir()) == []


def test_old_report_is_replaced_only_when_asked_and_stays_where_the_new_one_fails(inspections, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw_figures", lambda inspection, scales: {})
    folder = tmp_path / "report"
    first = report.write_report(folder, inspections[0]).page.read_text()
    with pytest.raises(ValueError, match=r"There is a report in .* already"):
        report.write_report(folder, inspections[1])
    with monkeypatch.context() as context, pytest.raises(OSError, match="disk"):
        context.setattr(report, "_page", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        report.write_report(folder, inspections[1], overwrite=True)
    assert (folder / "report.html").read_text() == first
    (folder / "old.png").touch()
    second = report.write_report(folder, inspections[1], overwrite=True).page.read_text()
    assert second != first and not (folder / "old.png").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_nothing_but_a_report_is_ever_replaced(inspections, tmp_path):
    (tmp_path / "precious.txt").touch()
    with pytest.raises(ValueError, match="holds other things than a report"):
        report.write_report(tmp_path, inspections[1], overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        report.check_output(tmp_path / "precious.txt")


# Words


def test_verdict_says_why_there_are_none(inspections):
    metrics = copy.deepcopy(inspections[0].metrics)
    verdict = metrics["verdict"]
    verdict["has_artifacts"] = False
    cases = [
        ({"share": 0.0005}, "less than the 0.1 % that would count"),
        ({"share": 0.02, "ratio": 1.2}, "too near the others: 1.2 times"),
        ({"ratio": 9.0, "bimodality": 0.2}, "the tail of the others"),
        ({"bimodality": 0.9, "significance": 1.0}, "Give more images"),
        ({"significance": 9.0, "split_off_layer": None}, "come with the images"),
    ]
    for change, expected in cases:
        verdict |= change
        assert expected in sections.verdict_sentences(metrics)[1]


def test_other_side_is_pointed_at(inspections):
    metrics = copy.deepcopy(inspections[1].metrics)
    for method, each in metrics["thresholds"]["low"].items():
        each |= {"has_artifacts": method == "mad", "share": 0.03}
    assert sections.next_steps(metrics)[1].startswith("On the low side mad finds a group of 3 %; --side low tells")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "\N{EN DASH}"), (0.123456, "0.123"), (12.3456, "12.3"), (1463.2, "1,463"), (0.0, "0")],
)
def test_numbers_are_short(value, expected):
    assert sections.number(value) == expected


# The command's function


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ViTRegModel(tiny_config(num_hidden_layers=2)).save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 21}, crop_size={"height": 21, "width": 49}, image_mean=MEAN, image_std=STD
    )
    processor.save_pretrained(folder)
    return folder


def test_folders_on_disk_become_a_report(repository, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(figures, "draw_figures", lambda inspection, scales: {})
    images = write_folder(tmp_path / "images", {"blue": 6, "red": 6})
    checkpoints = tmp_path / "checkpoints"
    for step in (10, 200):
        ViTRegModel(tiny_config(num_hidden_layers=2)).save_pretrained(checkpoints / f"step-{step:08d}")
    done = report.inspect_model(
        repository, [images], tmp_path / "report", compare=repository, checkpoints=checkpoints, size=(21, 35)
    )
    metrics = json.loads((done.folder / "metrics.json").read_text())
    assert metrics["images"]["num_classes"] == 2 and metrics["images"]["width"] == 35
    assert [row["step"] for row in metrics["training_curve"]] == [10, 200]
    assert metrics["compare"]["model"]["sha256"] == metrics["model"]["sha256"]
    assert metrics["images"]["sha256"] and "LOAD REPORT" not in "".join(capfd.readouterr())


def test_folder_of_checkpoints_stands_for_the_last(repository, tmp_path):
    for step in (3, 20):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for path in repository.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    images = write_folder(tmp_path / "images", {"blue": 3})
    done = report.inspect_model(tmp_path / "run", [images], tmp_path / "report")
    metrics = json.loads((done.folder / "metrics.json").read_text())
    assert metrics["model"]["name"].endswith("checkpoint-20") and len(metrics["training_curve"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gone"}, "Cannot load gone"),
        ({"compare": "gone"}, "Cannot load gone"),
        ({"checkpoints": "gone"}, "There are no checkpoints in gone"),
        ({"device": "cuda:99"}, "There is no device 'cuda:99' here"),
        ({"images": ["gone"]}, "There is no image in gone"),
        ({"size": (20, 35)}, "A height of 20 pixels is no multiple of the patch size 7"),
        ({"max_images": 0}, "must be 1 or more"),
    ],
)
def test_what_cannot_be_used_is_named_and_leaves_no_report(repository, tmp_path, change, message):
    write_folder(tmp_path / "images", {"blue": 2})
    options = {"model": repository, "images": [tmp_path / "images"], "output": tmp_path / "report", **change}
    with pytest.raises(ValueError, match=message):
        report.inspect_model(**options)
    assert not (tmp_path / "report").exists()


def test_model_that_is_no_vit_is_named(tmp_path):
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    write_folder(tmp_path / "images", {"blue": 2})
    with pytest.raises(ValueError, match="model_type 'bert', BertModel is no plain ViT"):
        report.inspect_model(tmp_path / "bert", [tmp_path / "images"], tmp_path / "report")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_page_fits_a_browser_window(written, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and chromium")
    with playwright.sync_playwright() as browsers:
        try:
            # Debian's, where there is one; else what playwright installed for itself. root may not use the sandbox
            browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"chromium does not start: {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": width, "height": 900})
        problems = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto(written.page.resolve().as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".answer").first.inner_text() == "Artifacts: yes."
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert problems == []
        browser.close()

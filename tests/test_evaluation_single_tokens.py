# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass

import numpy as np
import PIL.Image
import pytest
import torch
from planted import COLS, NUM_REGISTERS, PATCH_SIZE, ROWS, patchy_image, planted_encoder
from sklearn.linear_model import LogisticRegression

from hf_vitreg.evaluation.single_tokens import DrawnTokens, available_kinds, draw_tokens
from hf_vitreg.evaluation.token_probes import class_score, position_score, reconstruction_error


NUM_PREFIX = 1 + NUM_REGISTERS
THRESHOLD = 30.0  # between the planted outliers and all others


@dataclass
class Patchy:
    """Images with one or two patches that the planted model makes outliers of; the last has none."""

    count: int = 7
    display_name: str = "patchy"

    def __len__(self):
        return self.count

    def name(self, index):
        return f"patchy {index}"

    def content(self, index):
        return self.image(index).tobytes()

    def image(self, index):
        if index == self.count - 1:
            pixels = np.random.default_rng(99).integers(0, 256, (ROWS * PATCH_SIZE, COLS * PATCH_SIZE, 3), "uint8")
            return PIL.Image.fromarray(pixels)
        return patchy_image(index)[0]


def draw(encoder=None, **more):
    settings = {"num_draws": 3, "preprocessing": "fit", "batch_size": 4, **more}
    return draw_tokens(encoder or planted_encoder(3000), Patchy(), settings.pop("threshold", THRESHOLD), **settings)


def test_tokens_are_drawn_among_those_of_their_kind():
    encoder, data = planted_encoder(3000), Patchy()
    drawn = draw(encoder)
    assert list(drawn) == ["cls", "normal", "outlier", "register"] == list(available_kinds(encoder))
    assert drawn["outlier"].images.tolist() == list(range(6)) and drawn["outlier"].num_without == 1
    assert len(drawn["normal"]) == 7 and drawn["normal"].grid == (ROWS, COLS)
    for row, image in enumerate(drawn["outlier"].images.tolist()):
        is_constant = torch.from_numpy(patchy_image(image)[1]).flatten()
        assert is_constant[drawn["outlier"].cells[row]].all()
        assert not is_constant[drawn["normal"].cells[row]].any()
    pixels = encoder.preprocess([data.image(index) for index in range(7)])
    final = encoder.final(encoder.layers(pixels, [-1])[-1])
    assert torch.allclose(drawn["cls"].tokens[:, 0], final[:, 0], atol=1e-5) and drawn["cls"].tokens.shape[1] == 1
    for kind in ("normal", "outlier"):
        expected = final[drawn[kind].images[:, None], drawn[kind].cells + NUM_PREFIX]
        assert torch.allclose(drawn[kind].tokens, expected, atol=1e-5)
    registers = drawn["register"].tokens[:, :, None] - final[:, None, 1:NUM_PREFIX]
    assert registers.abs().amax(dim=-1).amin(dim=-1).max() < 1e-5 and (drawn["register"].cells == -1).all()


def test_draws_depend_on_the_seed_and_the_image_alone():
    drawn = draw(num_draws=8)
    alone = draw(num_draws=8, kinds=["normal"], batch_size=1, num_workers=1)["normal"]
    assert torch.equal(drawn["normal"].cells, alone.cells)
    assert torch.allclose(drawn["normal"].tokens, alone.tokens, atol=1e-5)
    assert not torch.equal(draw(num_draws=8, kinds=["normal"], seed=1)["normal"].cells, alone.cells)
    assert len({tuple(cells) for cells in alone.cells.tolist()}) == 7
    assert all(len(set(cells)) > 1 for cells in alone.cells.tolist())


def test_pixels_are_those_of_the_patches():
    encoder = planted_encoder(3000)
    drawn = draw(encoder, kinds=["outlier"], with_pixels=True)["outlier"]
    pixels = encoder.preprocess([Patchy().image(index) for index in range(7)])
    for row, image in enumerate(drawn.images.tolist()):
        for number, cell in enumerate(drawn.cells[row].tolist()):
            top, left = (PATCH_SIZE * place for place in divmod(cell, COLS))
            patch = pixels[image, :, top : top + PATCH_SIZE, left : left + PATCH_SIZE]
            assert torch.equal(drawn.pixels[row, number], patch.flatten())


@pytest.mark.parametrize(("threshold", "empty"), [(float("inf"), "outlier"), (-1.0, "normal")])
def test_a_kind_that_no_image_has_is_empty(threshold, empty):
    drawn = draw(threshold=threshold)
    assert (len(drawn[empty]), drawn[empty].num_without) == (0, 7)
    with pytest.raises(ValueError, match="None of the 7 training images has such a token"):
        class_score(drawn[empty], [0] * 7, drawn[empty], [0] * 7, 2)
    with pytest.raises(ValueError, match="None of the 7 training images has such a patch"):
        position_score(drawn[empty], drawn[empty])


def test_tokens_that_a_model_has_not_are_refused():
    encoder = planted_encoder(1, num_registers=0)
    assert available_kinds(encoder) == ("cls", "normal", "outlier")
    with pytest.raises(ValueError, match="has no 'register' tokens, only cls, normal, outlier"):
        draw(encoder, kinds=["register"])
    with pytest.raises(ValueError, match="num_draws=0 of patchy"):
        draw(encoder, num_draws=0)


def test_one_register_is_drawn_once():
    assert draw(planted_encoder(1, num_registers=1), kinds=["register"])["register"].tokens.shape[:2] == (7, 1)


# Probes


def drawn_from(tokens: torch.Tensor, images=None, cells=None, pixels=None, grid=(3, 5)) -> DrawnTokens:
    """Of tokens `(num_images, num_draws, hidden_size)`."""
    images = torch.arange(len(tokens)) if images is None else images
    cells = torch.zeros(tokens.shape[:2], dtype=torch.long) if cells is None else cells
    return DrawnTokens(images, tokens, cells, pixels, 0, grid)


def test_class_score_is_logistic_regression_for_every_draw():
    labels = torch.randint(0, 3, (110,))
    tokens = torch.randn(110, 4, 6) + 0.8 * torch.eye(3, 6)[labels][:, None]
    # images 1, 3, ... train, of which some have no token
    train, validation = torch.arange(1, 110, 2)[3:], torch.arange(0, 110, 2)
    drawn = [drawn_from(tokens[images], images) for images in (train, validation)]
    score = class_score(drawn[0], labels, drawn[1], labels, 3, Cs=(0.7,))
    expected = []
    for draw_number in range(4):
        model = LogisticRegression(C=0.7, tol=1e-8, max_iter=2000)
        model.fit(tokens[train, draw_number].double().numpy(), labels[train].numpy())
        expected.append(model.score(tokens[validation, draw_number].double().numpy(), labels[validation].numpy()))
    assert score.accuracies == pytest.approx(expected) and len(set(expected)) > 1
    assert (score.accuracy, score.std) == pytest.approx((np.mean(expected), np.std(expected)))
    assert score.C == 0.7


def test_class_score_of_one_draw_has_no_spread():
    labels = [0, 1] * 20
    drawn = drawn_from(torch.tensor(labels, dtype=torch.float32)[:, None, None] + 0.1 * torch.randn(40, 1, 4))
    score = class_score(drawn, labels, drawn, labels, 2, Cs=(1.0, 100.0))
    assert (score.accuracy, score.std) == (1.0, None)


def test_position_score_measures_the_distance_of_what_is_wrong():
    cells = torch.randint(0, 15, (60, 8))
    codes = 3 * torch.eye(15)
    train = drawn_from(codes[cells] + 0.05 * torch.randn(60, 8, 15), cells=cells)
    assert position_score(train, train)[:2] == (1.0, 0.0)
    # half of the tokens of row 0, column 0 look like row 2, column 3
    seen, true = torch.tensor([[0, 13], [7, 7]]), torch.tensor([[0, 0], [7, 7]])
    score = position_score(train, drawn_from(codes[seen], cells=true))
    assert score[:2] == pytest.approx((0.75, 13**0.5 / 4))
    assert score.C in (0.01, 0.1, 1.0, 10.0, 100.0)


def test_position_needs_a_patch_in_every_cell():
    cells = torch.randint(0, 14, (30, 9))
    drawn = drawn_from(torch.randn(30, 9, 4), cells=cells)
    with pytest.raises(
        ValueError, match="1 of the 3x5 cells have no training patch of the kind, row 2, column 4 first"
    ):
        position_score(drawn, drawn)
    other = drawn_from(torch.randn(30, 9, 4), cells=cells, grid=(5, 3))
    with pytest.raises(ValueError, match="Both splits must have one grid"):
        position_score(drawn, other)


def test_reconstruction_is_least_squares():
    weight = torch.randn(6, 27)
    tokens, others = torch.randn(40, 3, 6) + 2, torch.randn(11, 3, 6)
    pixels, true = (each @ weight + 1 + 0.3 * torch.randn(*each.shape[:2], 27) for each in (tokens, others))
    error = reconstruction_error(drawn_from(tokens, pixels=pixels), drawn_from(others, pixels=true))
    ones = [np.c_[each.flatten(0, 1).double().numpy(), np.ones(each.shape[:2].numel())] for each in (tokens, others)]
    solution = np.linalg.lstsq(ones[0], pixels.flatten(0, 1).double().numpy(), rcond=None)[0]
    expected = np.linalg.norm(ones[1] @ solution - true.flatten(0, 1).double().numpy(), axis=1).mean()
    assert error == pytest.approx(expected, rel=1e-4)
    few = drawn_from(tokens[:2], pixels=pixels[:2])
    with pytest.raises(ValueError, match="6 patches are too few to fit 6 channels"):
        reconstruction_error(few, few)

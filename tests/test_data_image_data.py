# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from sample_images import colour_image, write_folder

from hf_vitreg.data.image_data import FileImages, content_hash, decode, read_ahead


def test_the_hash_is_of_content_and_order(tmp_path):
    paths = sorted(write_folder(tmp_path, {"ant": 3, "cat": 5}).rglob("*.png"))
    images = FileImages(paths, "birds")
    before = content_hash(images)
    assert images.sha256() == before == content_hash(FileImages(paths, "fish"))
    assert content_hash(FileImages(paths[::-1], "birds")) != before != content_hash(FileImages(paths[1:], "birds"))
    pixels = np.array(images.image(2))
    pixels[3, 5, 1] ^= 1
    PIL.Image.fromarray(pixels).save(paths[2])
    assert content_hash(FileImages(paths, "birds")) != before == images.sha256(), "read once"


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def test_images_are_upright_and_rgb():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = decode(encoded(PIL.Image.new("L", (37, 23)), format="PNG", exif=exif), "a.png")
    assert (image.mode, image.size) == ("RGB", (23, 37))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not an image", "no image that Pillow knows"),
        (encoded(colour_image(0, 0), format="PNG")[:200], "cannot be read as an image"),
        (encoded(PIL.Image.new("I;16", (5, 3)), format="PNG"), "more than 8 bits a channel"),
    ],
)
def test_what_is_no_image_is_named(content, reason):
    with pytest.raises(ValueError, match=rf"some/cat\.png .*{reason}"):
        decode(content, "some/cat.png")


def test_a_file_that_went_away_is_named(tmp_path):
    images = FileImages([tmp_path / "gone.png"], "gone")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read: No such file"):
        images.image(0)
    assert content_hash(images)


def test_results_come_in_order_and_no_more_than_asked_for_are_made():
    started = []

    def slow_first(number):
        started.append(number)
        time.sleep(0.02 if number == 0 else 0)
        return number**2

    with ThreadPoolExecutor(3) as pool:
        results = read_ahead(slow_first, range(20), pool, ahead=4)
        assert [next(results), next(results)] == [0, 1]
        assert len(started) <= 2 + 4
        assert list(results) == [number**2 for number in range(2, 20)]

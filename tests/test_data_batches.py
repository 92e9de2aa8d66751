# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import logging
import multiprocessing
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sample_images import png
from torch.utils.data import default_collate

from hf_vitreg.data.batches import TrainingBatches
from hf_vitreg.data.orders import MappedOrder, StreamOrder


# torch advises against more workers than cores, and what is tested does not depend on either
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def transform(image):
    """The image with noise, so that what is drawn at random is seen."""
    pixels = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)
    return {"pixel_values": pixels[:, ::6, ::6] + torch.rand(1), "noise": torch.rand(2)}


def finish(batch, number):
    return batch | {"number": torch.tensor(number)}


def images(num_images, bad=()):
    """Their labels are their numbers; some are no images."""
    rows = {
        "image": [
            {"bytes": b"no image" if index in bad else png(index, index), "path": None} for index in range(num_images)
        ],
        "name": [f"row {index}" for index in range(num_images)],
        "label": list(range(num_images)),
        "caption": [f"number {index}" for index in range(num_images)],
    }
    dataset = datasets.Dataset.from_dict(rows)
    return dataset.cast_column("image", datasets.Image(decode=False))


def batches_of(dataset, batch_size=4, num_workers=0, process_index=0, num_processes=1, **settings):
    if isinstance(dataset, datasets.IterableDataset):
        order = StreamOrder(dataset, 7, 5, process_index, num_processes)
    else:
        order = MappedOrder(dataset, 7, batch_size, process_index, num_processes)
    settings = {"wants": "labels", "collate": default_collate, **settings}
    return TrainingBatches(
        order, transform, finish=finish, batch_size=batch_size, seed=7, num_workers=num_workers, **settings
    )


def take(batches, count):
    with batches:
        return list(islice(batches, count))


def equal(first, second):
    return len(first) == len(second) and all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(first, second)
    )


def labels(found):
    return torch.cat([batch["labels"] for batch in found]).tolist()


def test_batches_are_numbered_and_hold_what_is_wanted():
    dataset = images(5)
    found = take(batches_of(dataset), 3)
    assert [batch["number"].item() for batch in found] == [0, 1, 2]
    assert all(batch["pixel_values"].shape == (4, 3, 4, 7) for batch in found)
    assert sorted(labels(found)[:5]) == sorted(labels(found)[5:10]) == list(range(5))
    assert "labels" not in take(batches_of(dataset, wants="images"), 1)[0]


def test_captions_reach_the_collate_function():
    def collate(samples):
        assert all(sample.keys() == {"pixel_values", "noise", "caption"} for sample in samples)
        return {"numbers": torch.tensor([int(sample["caption"].removeprefix("number ")) for sample in samples])}

    found = take(batches_of(images(4), wants="captions", collate=collate), 1)
    assert sorted(found[0]["numbers"].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [(), (1, 2, 8)], ids=["all good", "some bad"])
def test_batches_do_not_depend_on_the_number_of_workers(bad):
    expected = take(batches_of(images(11, bad)), 7)
    for num_workers in (1, 2):
        assert equal(take(batches_of(images(11, bad), num_workers=num_workers), 7), expected)


def test_nothing_is_drawn_from_the_generators_of_the_training():
    torch.manual_seed(1)
    take(batches_of(images(5)), 3)
    first = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), first)


def test_an_image_is_augmented_anew_in_each_pass_and_the_same_for_a_seed():
    found = take(batches_of(images(4)), 2)
    by_label = [dict(zip(batch["labels"].tolist(), batch["noise"])) for batch in found]
    assert not any(torch.equal(by_label[0][label], by_label[1][label]) for label in range(4))
    assert equal(found, take(batches_of(images(4)), 2))


@pytest.mark.parametrize("bad", [(0,), (3, 4, 5, 6), (0, 2, 4, 6, 8, 10, 12)])
def test_images_after_a_bad_one_move_up(bad):
    """Full batches of the readable images, each once in a pass, in the order that they would have had."""
    expected = [label for label in labels(take(batches_of(images(13)), 13)) if label not in bad]
    found = take(batches_of(images(13, bad)), 6)
    assert all(len(batch["labels"]) == 4 for batch in found)
    assert labels(found) == expected[:24]


def test_a_bad_image_is_named_once_and_counted_once(caplog):
    batches = batches_of(images(7, bad=[2, 5]))
    with caplog.at_level(logging.WARNING):
        take(batches, 6)
    assert batches.num_bad == 2 and sorted(batches.bad_images) == ["row 2", "row 5"]
    assert sorted(record.getMessage().split(" cannot")[0] for record in caplog.records) == [
        "Skipped: row 2",
        "Skipped: row 5",
    ]


def test_after_a_bad_image_batches_are_soon_whole_again(monkeypatch):
    """Those put together from two parts cost a copy."""
    batches, copied = batches_of(images(40, bad=[3])), []
    concatenate = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: copied.append(len(parts)) or concatenate(parts))
    take(batches, 10)
    assert 0 < len(copied) <= 2 * 3  # three tensors a batch


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("streams", [False, True], ids=["mapped", "streamed"])
def test_an_interrupted_run_has_the_same_batches(streams, num_processes):
    """At every step, with bad images, and with another number of workers."""
    dataset = images(17, bad=[1, 6, 7, 11])
    dataset = dataset.to_iterable_dataset(num_shards=3) if streams else dataset
    settings = {"process_index": num_processes - 1, "num_processes": num_processes}
    whole, states, expected = batches_of(dataset, **settings), [], []
    with whole:
        for batch in islice(whole, 9):
            expected.append(batch)
            states.append(json.loads(json.dumps(whole.state())))
    for done, state in enumerate(states[:-1], start=1):
        again = batches_of(dataset, num_workers=2 if done == 4 else 0, **settings)
        again.load_state(state)
        assert again.state() == state
        assert equal(take(again, 9 - done), expected[done:])
        assert [again.num_batches, *again.bad_images] == [whole.num_batches, *whole.bad_images]


def test_a_state_counts_only_what_was_used():
    batches = batches_of(images(40, bad=[5]), num_workers=2, prefetch_factor=4)
    with batches:
        next(batches)
        assert batches.state()["order"]["position"] in (4, 5)


def test_loading_a_state_forgets_what_was_read_ahead():
    batches = batches_of(images(9, bad=[4]))
    with batches:
        next(batches)
        state = batches.state()
        expected = list(islice(batches, 4))
        batches.load_state(state)
        assert equal(list(islice(batches, 4)), expected)


def test_bad_images_stop_where_they_may_not_be_skipped():
    with pytest.raises(ValueError, match=r"row 1 cannot be read as an image: .*--on_bad_image skip"):
        take(batches_of(images(4, bad=[1]), on_bad_image="raise"), 1)


@pytest.mark.parametrize("streams", [False, True], ids=["mapped", "streamed"])
def test_a_source_without_a_readable_image_does_not_go_on_for_ever(streams):
    dataset = images(5, bad=range(5))
    dataset = dataset.to_iterable_dataset() if streams else dataset
    with pytest.raises(ValueError, match="None of the images can be read"):
        take(batches_of(dataset), 1)


def test_few_readable_images_are_enough():
    found = take(batches_of(images(50, bad=range(49))), 2)
    assert labels(found) == [49] * 8


def test_an_error_of_the_transform_is_no_bad_image():
    def broken(image):
        raise RuntimeError("a mistake")

    order = MappedOrder(images(4), 0, 2)
    with pytest.raises(RuntimeError, match="a mistake"):
        take(TrainingBatches(order, broken, default_collate, finish, 2, 0), 1)


def test_workers_end_with_their_batches():
    with batches_of(images(9), num_workers=2) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def test_the_interpreter_ends_where_batches_were_not_closed():
    code = """
        from test_data_batches import batches_of, images

        batches = batches_of(images(9).to_iterable_dataset(num_shards=2), num_workers=2)
        next(batches)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parent, timeout=120, check=True)

# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
from collections import Counter
from itertools import chain, islice

import datasets
import pytest
from sample_images import write_tar
from timm.data.distributed_sampler import RepeatAugSampler

from hf_vitreg.data.orders import MappedOrder, StreamOrder


SHARDS = (5, 2, 7, 3)  # examples of each


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def take(order, count):
    return list(islice(order, count))


def resumed(order, state):
    order.load_state(json.loads(json.dumps(state)))
    return order


# Mapped


def mapped(num_images=23, **settings):
    settings = {"seed": 5, "batch_size": 4, **settings}
    return MappedOrder(range(num_images), **settings)


def test_each_pass_over_a_dataset_is_another_permutation():
    examples = take(mapped(), 3 * 23)
    assert [example.position for example in examples] == list(range(69))
    passes = [[example.index for example in examples if example.epoch == epoch] for epoch in range(3)]
    assert all(sorted(indices) == list(range(23)) for indices in passes)
    assert len({tuple(indices) for indices in passes}) == 3


def test_the_seed_chooses_the_permutations():
    assert take(mapped(), 9) == take(mapped(), 9) != take(mapped(seed=6), 9)


@pytest.mark.parametrize("num_repetitions", [1, 2, 3])
def test_processes_together_see_the_batches_of_one(num_repetitions):
    one = take(mapped(batch_size=12, num_repetitions=num_repetitions), 60)
    some = [
        take(mapped(batch_size=4, process_index=rank, num_processes=3, num_repetitions=num_repetitions), 20)
        for rank in range(3)
    ]
    together = [some[rank][4 * batch + place] for batch in range(5) for rank in range(3) for place in range(4)]
    assert [example[1:] for example in together] == [example[1:] for example in one]


def global_batches(order_of, num_processes, batch_size, num_batches):
    """Indices by batch and process."""
    indices = [order_of(rank)[: batch_size * num_batches] for rank in range(num_processes)]
    return [[own[batch * batch_size : (batch + 1) * batch_size] for own in indices] for batch in range(num_batches)]


@pytest.mark.parametrize(("num_processes", "batch_size", "num_repetitions"), [(3, 4, 3), (4, 6, 3), (2, 6, 3)])
def test_repetitions_share_a_batch_and_are_on_different_processes_as_those_of_timm(
    num_processes, batch_size, num_repetitions
):
    def ours(rank):
        order = mapped(768, batch_size=batch_size, process_index=rank, num_processes=num_processes, num_repetitions=3)
        return [example.index for example in take(order, 60)]

    def of_timm(rank):
        return list(RepeatAugSampler(range(768), num_processes, rank, num_repeats=num_repetitions))

    most_on_one_process = -(-num_repetitions // num_processes)
    for order_of in (ours, of_timm):
        for batch in global_batches(order_of, num_processes, batch_size, num_batches=5):
            assert set(Counter(chain(*batch)).values()) == {num_repetitions}
            assert max(max(Counter(own).values()) for own in batch) <= most_on_one_process


def test_with_repetitions_an_image_comes_back_when_all_others_were_there():
    examples = take(mapped(batch_size=6, num_repetitions=2), 2 * 23 * 3)
    for epoch in range(2):
        own = [(example.index, example.repetition) for example in examples if example.epoch == epoch]
        assert sorted(own) == [(index, repetition) for index in range(23) for repetition in range(2)]


def test_an_interrupted_permutation_goes_on_at_every_position():
    settings = {"process_index": 1, "num_processes": 2, "num_repetitions": 2}
    order = mapped(7, **settings)
    examples = take(order, 40)
    for position in range(40):
        assert take(resumed(mapped(7, **settings), order.state(position)), 40 - position) == examples[position:]


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({"batch_size": 5}, "--per_device_train_batch_size 4 then, 5 now"),
        ({"num_processes": 2}, "num_processes 1 then, 2 now"),
        ({"seed": 1}, "--seed 5 then, 1 now"),
        ({"num_images": 22}, "num_images 23 then, 22 now"),
    ],
)
def test_the_order_of_another_run_is_refused(now, named):
    with pytest.raises(ValueError, match=named):
        mapped(**now).load_state(mapped().state(0))


def test_no_image_and_repetitions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no training image"):
        mapped(0)
    with pytest.raises(ValueError, match=r"--num_repeated_augmentations 3 must divide.* 8"):
        mapped(num_processes=2, num_repetitions=3)


# Streams


def numbers(num_examples):
    """The names of the examples of each shard."""
    starts = [sum(num_examples[:shard]) for shard in range(len(num_examples))]
    return [[str(start + number) for number in range(count)] for start, count in zip(starts, num_examples)]


def parquet_stream(folder, num_examples=SHARDS):
    for shard, names in enumerate(numbers(num_examples)):
        datasets.Dataset.from_dict({"name": names}).to_parquet(folder / f"{shard}.parquet")
    return datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)


def tar_stream(folder, num_examples=SHARDS):
    for shard, names in enumerate(numbers(num_examples)):
        write_tar(folder / f"{shard}.tar", {name: {"txt": name.encode()} for name in names})
    stream = datasets.load_dataset("webdataset", data_files=str(folder / "*.tar"), split="train", streaming=True)
    return stream.map(lambda row: {"name": row["txt"]}, remove_columns=stream.column_names)


@pytest.fixture
def opened():
    """Opens orders, and closes them after the test."""
    orders = []

    def make(dataset, seed=3, buffer_size=4, **settings):
        orders.append(StreamOrder(dataset, seed, buffer_size, **settings))
        return orders[-1]

    yield make
    for order in orders:
        order.close()


def test_a_resumed_stream_of_datasets_alone_loses_what_was_in_its_buffer():
    """What `StreamOrder` is there for; where this fails one day, it may go."""
    rows = datasets.Dataset.from_dict({"name": [str(number) for number in range(sum(SHARDS))]})
    stream = rows.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=8)
    iterator = iter(stream)
    seen = [row["name"] for row in islice(iterator, 6)]
    state = stream.state_dict()
    stream.load_state_dict(state)
    seen += [row["name"] for row in stream]
    assert len(seen) < sum(SHARDS)


@pytest.mark.parametrize("make", [parquet_stream, tar_stream])
def test_each_pass_over_a_stream_has_each_example_once_in_another_order(tmp_path, opened, make):
    examples = take(opened(make(tmp_path)), 17 * 3)
    passes = [[example for example in examples if example.epoch == epoch] for epoch in range(3)]
    assert all(sorted(int(example.row["name"]) for example in own) == list(range(17)) for own in passes)
    assert all(sorted(example.index for example in own) == list(range(17)) for own in passes)
    assert len({tuple(example.row["name"] for example in own) for own in passes}) == 3


def test_shards_change_places_and_examples_stay_within_their_block(tmp_path, opened):
    examples = take(opened(parquet_stream(tmp_path), buffer_size=4), 17 * 6)
    shard_of = {name: shard for shard, names in enumerate(numbers(SHARDS)) for name in names}
    orders = set()
    for epoch in range(6):
        own = sorted(example[1:] for example in examples if example.epoch == epoch)
        orders.add(tuple(dict.fromkeys(shard_of[row["name"]] for *_, row in own)))
        came = [index for _, index, *_ in (example[1:] for example in examples if example.epoch == epoch)]
        assert all(sorted(came[start : start + 4]) == list(range(17))[start : start + 4] for start in range(0, 17, 4))
    assert len(orders) > 2


CASES = {
    "parquet": (parquet_stream, SHARDS, {}),
    "tars": (tar_stream, SHARDS, {}),
    "parquet, first of two processes": (parquet_stream, SHARDS, {"process_index": 0, "num_processes": 2}),
    "tars, second of two processes": (tar_stream, SHARDS, {"process_index": 1, "num_processes": 2}),
    "three shards for two processes": (parquet_stream, (4, 5, 3), {"process_index": 1, "num_processes": 2}),
    "one shard for two processes": (parquet_stream, (13,), {"process_index": 1, "num_processes": 2}),
    "tar, one shard for two processes": (tar_stream, (13,), {"process_index": 0, "num_processes": 2}),
    "block larger than the stream": (parquet_stream, (3, 4), {"buffer_size": 50}),
}


@pytest.mark.parametrize(("make", "num_examples", "settings"), CASES.values(), ids=CASES)
def test_an_interrupted_stream_goes_on_at_every_position(tmp_path, opened, make, num_examples, settings):
    stream = make(tmp_path, num_examples)
    whole, count = opened(stream, **settings), 35
    assert take(opened(stream, **settings), count) == (examples := take(whole, count))
    assert examples[-1].epoch >= 1
    again = opened(stream, **settings)
    for position in range(count):
        state = whole.state(position)
        again = resumed(again, state)
        assert again.state(position) == state
        assert take(again, count - position) == examples[position:]


def test_a_resumed_stream_reads_its_block_again_and_no_more(tmp_path, opened):
    read = []
    stream = parquet_stream(tmp_path, (30, 30)).map(lambda row: read.append(row["name"]) or row)
    order = opened(stream, buffer_size=6)
    take(order, 45)
    state = order.state(45)
    order.close()
    read.clear()
    again = resumed(opened(stream, buffer_size=6), state)
    next(again)
    again.close()
    assert len(read) <= 2 * 6  # its block, and the one ahead


@pytest.mark.parametrize("num_examples", [SHARDS, (4, 5, 3), (13,)])
def test_processes_share_a_stream_and_no_random_seed(tmp_path, opened, num_examples):
    stream = parquet_stream(tmp_path, num_examples)
    orders = [opened(stream, process_index=rank, num_processes=2) for rank in range(2)]
    total = sum(num_examples)
    examples = [[example for example in take(order, 2 * total) if example.epoch == 0] for order in orders]
    names = [int(example.row["name"]) for own in examples for example in own]
    assert sorted(names) == list(range(total))
    assert len({example.index for own in examples for example in own}) == total


def test_a_process_without_an_image_says_so(tmp_path, opened):
    order = opened(parquet_stream(tmp_path, (1,)), process_index=1, num_processes=2)
    with pytest.raises(ValueError, match="no image for process 2 of 2"):
        next(order)


def test_the_stream_of_another_run_is_refused(tmp_path, opened):
    stream = parquet_stream(tmp_path)
    with pytest.raises(ValueError, match="--shuffle_buffer_size 4 then, 5 now"):
        opened(stream, buffer_size=5).load_state(opened(stream).state(0))

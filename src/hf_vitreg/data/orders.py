# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Which training image comes next, for ever, and how a restarted run finds its place in that order again."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count, islice
from typing import NamedTuple, Protocol

import datasets
import torch
from datasets.distributed import split_dataset_by_node

from ..distributed import derived_seed


class Example(NamedTuple):
    """One training image of one process.

    Attributes:
        position: How many examples of this process came before it.
        epoch: The pass over all images that it belongs to.
        index: Its number in that pass before it was shuffled; of a mapped dataset its row. No two processes share one.
        repetition: How often the image came before in its global batch.
        row: What the dataset says of it. `None` where workers read that themselves, from `Order.rows`.
    """

    position: int
    epoch: int
    index: int
    repetition: int
    row: dict | None


class Order(Protocol):
    """Examples of one process without end.

    Attributes:
        rows: By the index of an example its row; `None` where the examples bring it along.
    """

    rows: Sequence[dict] | None

    def __next__(self) -> Example: ...

    def state(self, position: int) -> dict:
        """What `load_state` needs to go on from a position, in the types of JSON.

        Args:
            position: Of an example that came, or of the one to come. None before it is asked for afterwards.
        """

    def load_state(self, state: dict) -> None:
        """Goes on from there. Raises `ValueError` where the state belongs to another order."""

    def close(self) -> None:
        """Reads nothing ahead any more."""


class MappedOrder:
    """A new permutation of a dataset for each pass, cut so that some processes see what one would.

    Batch `n` of process `p` of `P`, each with `B` images, has the places `n*B*P + p*B` to `n*B*P + (p+1)*B`.

    With repeated augmentation (Hoffer et al., 2020, section 3; DeiT, section 6) a global batch holds
    `B*P / num_repetitions` images, each so many times, on different processes where there are enough. An epoch is as
    many examples as there are images, hence of fewer different ones, and an image comes back when all others were
    there.

    Args:
        dataset: Anything with a length and rows.
        seed: Of the permutations.
        batch_size: Images of a batch of one process.
        process_index, num_processes: Which one of how many.
        num_repetitions: Times that an image is in a global batch.

    Raises:
        ValueError: for a dataset without images, or a global batch that does not hold each image `num_repetitions`
            times.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_repetitions: int = 1,
    ):
        if not len(dataset):
            raise ValueError("There is no training image.")
        if batch_size * num_processes % num_repetitions:
            raise ValueError(
                f"--num_repeated_augmentations {num_repetitions} must divide the images of all processes in a batch, "
                f"{batch_size * num_processes}: change it or --per_device_train_batch_size."
            )
        self.rows = dataset
        self.seed = seed
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.images_per_batch = batch_size * num_processes // num_repetitions
        self.position = 0
        # a batch may have images of two passes
        self._permutation = lru_cache(maxsize=2)(self._drawn)

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        batch, offset = divmod(self.position, self.batch_size)
        # all images of the batch, then all of them again: far enough apart to be on different processes
        repetition, image = divmod(self.process_index * self.batch_size + offset, self.images_per_batch)
        epoch, place = divmod(batch * self.images_per_batch + image, len(self.rows))
        self.position += 1
        return Example(self.position - 1, epoch, int(self._permutation(epoch)[place]), repetition, None)

    def _drawn(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        return torch.randperm(len(self.rows), generator=generator)

    def state(self, position: int) -> dict:
        """See `Order.state`."""
        return {"position": position, **self._meaning()}

    def load_state(self, state: dict) -> None:
        """See `Order.load_state`."""
        _require_same(self._meaning(), state)
        self.position = state["position"]

    def _meaning(self) -> dict[str, int]:
        """What a position stands for follows from these."""
        return {
            "num_images": len(self.rows),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "images_per_batch": self.images_per_batch,
            "process_index": self.process_index,
            "num_processes": self.num_processes,
        }

    def close(self) -> None:
        """Nothing is read ahead."""


class _Block(NamedTuple):
    """Neighbours in a stream, that are shuffled among each other.

    Attributes:
        epoch, number: Which one of which pass.
        start: The state of the stream before it; `None` at the start of a pass.
        rows: As they came.
    """

    epoch: int
    number: int
    start: dict | None
    rows: list[dict]


class StreamOrder:
    """A stream, its shards in a new order for each pass, and blocks of neighbours shuffled within.

    `IterableDataset.shuffle` draws from a buffer that rolls on and that `state_dict` leaves out: what was in it is
    lost to a resumed run. A block starts where the stream can be found again by its `state_dict`, so a resumed run
    reads one block once more and leaves out what it had of it. The next block is read while one is used; both are in
    memory, encoded as they came.

    Each process has shards of its own, where there are enough, and begins its next pass when it is through with them:
    nobody waits for one that has more.

    Args:
        dataset: Rows with at least `image` and `name`.
        seed: Of the order of shards and of blocks.
        buffer_size: Images of a block.
        process_index, num_processes: Which one of how many.
    """

    rows = None

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        seed: int,
        buffer_size: int,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        strategy = "shards" if dataset.num_shards >= num_processes else "examples"
        # a copy even for one process, as its pass and its place are its own
        self._dataset = split_dataset_by_node(dataset, process_index, num_processes, strategy)
        self.seed = seed
        self.buffer_size = buffer_size
        self.process_index = process_index
        self.num_processes = num_processes
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")
        self._begin(_Block(0, 0, None, []), first_position=0, position=0)

    def _begin(self, block: _Block, first_position: int, position: int) -> None:
        """Nothing is read before the first example is asked for."""
        self.position = position
        self._num_skipped = position - first_position
        self._blocks = self._read_blocks(block.epoch, block.number, block.start)
        self._next_block: Future | None = None
        self._places: deque[int] = deque()
        # the blocks that a state may be asked of, by the position of their first example
        self._starts = deque([(first_position, block)])

    def _read_blocks(self, epoch: int, number: int, start: dict | None) -> Iterator[_Block]:
        while True:
            # datasets draws the order of the shards from the number of the pass
            self._dataset.set_epoch(derived_seed(self.seed, epoch))
            self._dataset.load_state_dict(start)
            stream = iter(self._dataset)
            for block in count(number):
                rows = list(islice(stream, self.buffer_size))
                if not rows:
                    break
                yield _Block(epoch, block, start, rows)
                start = self._dataset.state_dict()
            if block == 0:
                raise ValueError(
                    f"The stream has no image for process {self.process_index + 1} of {self.num_processes}. Give more "
                    "images or shards, or launch fewer processes."
                )
            epoch, number, start = epoch + 1, 0, None

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        while not self._places:
            self._open_next_block()
        place, block = self._places.popleft(), self._block
        index = (block.number * self.buffer_size + place) * self.num_processes + self.process_index
        self.position += 1
        return Example(self.position - 1, block.epoch, index, 0, block.rows[place])

    def _open_next_block(self) -> None:
        waiting = self._next_block or self._reader.submit(next, self._blocks)
        self._block = waiting.result()
        self._next_block = self._reader.submit(next, self._blocks)
        keys = (self.seed, self._block.epoch, self._block.number)
        generator = torch.Generator().manual_seed(derived_seed(*keys))
        places = torch.randperm(len(self._block.rows), generator=generator).tolist()
        self._places = deque(places[self._num_skipped :])
        if self.position > self._starts[-1][0] + self._num_skipped:
            # without its rows, that would stay in memory
            self._starts.append((self.position, self._block._replace(rows=[])))
        self._num_skipped = 0

    def state(self, position: int) -> dict:
        """See `Order.state`."""
        while len(self._starts) > 1 and self._starts[1][0] <= position:
            self._starts.popleft()
        first_position, block = self._starts[0]
        return {
            "position": position,
            "first_position": first_position,
            "epoch": block.epoch,
            "block": block.number,
            "stream": block.start,
            **self._meaning(),
        }

    def load_state(self, state: dict) -> None:
        """See `Order.load_state`."""
        _require_same(self._meaning(), state)
        if self._next_block is not None:
            self._next_block.exception()  # it reads the same stream
        block = _Block(state["epoch"], state["block"], state["stream"], [])
        self._begin(block, state["first_position"], state["position"])

    def _meaning(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "buffer_size": self.buffer_size,
            "num_shards": self._dataset.num_shards,
            "process_index": self.process_index,
            "num_processes": self.num_processes,
        }

    def close(self) -> None:
        """Waits for the block that is being read, and reads no other."""
        self._reader.shutdown(cancel_futures=True)


FLAGS = {"batch_size": "--per_device_train_batch_size", "buffer_size": "--shuffle_buffer_size", "seed": "--seed"}


def _require_same(meaning: dict[str, int], state: dict) -> None:
    changed = [name for name, value in meaning.items() if state.get(name) != value]
    if changed:
        told = ", ".join(f"{FLAGS.get(name, name)} {state.get(name)} then, {meaning[name]} now" for name in changed)
        raise ValueError(f"The order of the images is not that of the checkpoint: {told}. Resume with what it had.")

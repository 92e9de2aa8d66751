# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a process that trains step by step, when it is told to, shares with the one that tells it.

It runs in environments that do not have hf_vitreg, too, and needs torch alone.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import torch


NUM_BATCHES = 4


class Turns:
    """Waits for its turn on standard input, and says on standard output what came of it, one JSON object a line.

    Whatever else is printed goes to standard error.

    Attributes:
        setting: What the first argument of the command holds, as JSON.
        device: That it names.
    """

    def __init__(self):
        self.setting = json.loads(sys.argv[1])
        self.device = torch.device(self.setting["device"])
        self._channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        torch.set_num_threads(self.setting["threads"])
        torch.manual_seed(0)

    def say(self, **record: object) -> None:
        self._channel.write(json.dumps(record) + "\n")
        self._channel.flush()

    def wait(self) -> None:
        """Until it is this process's turn. Raises `SystemExit` when there is none any more."""
        if not sys.stdin.readline():
            raise SystemExit
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def done(self, losses: dict[str, float]) -> None:
        """The end of a turn."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._started, time.process_time() - self._cpu_started
        self.say(seconds=seconds, cpu_seconds=cpu_seconds, peak_bytes=peak_bytes(self.device), losses=losses)

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Crops, the same in every process: global `(batch, 2, 3, height, width)` and local ones."""
        generator = torch.Generator().manual_seed(0)
        sizes = [(2, self.setting["global_size"]), (self.setting["num_local_crops"], self.setting["local_size"])]
        shapes = [(self.setting["batch_size"], num_crops, 3, size, size) for num_crops, size in sizes]
        return [
            tuple(torch.randn(shape, generator=generator).to(self.device) for shape in shapes)
            for _ in range(NUM_BATCHES)
        ]


def peak_bytes(device: torch.device) -> int:
    """Of the GPU's tensors, or of the process's resident memory, by the high-water mark that Linux keeps."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""How fast a run trains, what share of the device that is, and how much memory it took."""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


# Dense half-precision products in 1e12 floating point operations a second, from the vendor's data sheets. V100 and T4
# reach them in float16: they have no bfloat16.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H20": 148,
    "A100": 312,
    "A40": 149.7,
    "A30": 165,
    "A10": 125,
    "A10G": 70,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}
# parts of cards, and cards of the same name with less power
NOT_WHOLE = {"MIG", "Laptop", "Max-Q"}
PRODUCT_SIZE = 1024
MEASURED_SECONDS = 0.25


def published_peak_flops(device_name: str) -> float | None:
    """Half-precision operations a second of a GPU by its name, as torch gives it; `None` where it is not known."""
    if any(word in device_name for word in NOT_WHOLE):
        return None
    words = set(re.split(r"[\s-]+", device_name))
    fitting = [name for name in PEAK_TFLOPS if words.issuperset(name.split())]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None


@torch.no_grad()
def measured_peak_flops(dtype: torch.dtype = torch.float32, seconds: float = MEASURED_SECONDS) -> float:
    """Operations a second of a matrix product on this CPU, the fastest of those that fit into the time."""
    left, right, product = (torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype) for _ in range(3))
    torch.mm(left, right, out=product)
    shortest, ends = float("inf"), time.perf_counter() + seconds
    while (started := time.perf_counter()) < ends:
        torch.mm(left, right, out=product)
        shortest = min(shortest, time.perf_counter() - started)
    return 2 * PRODUCT_SIZE**3 / shortest


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float | None:
    """What a device reaches at best: the published figure of a GPU, what is measured on a CPU; `None` if unknown."""
    if device.type == "cuda":
        return published_peak_flops(torch.cuda.get_device_name(device))
    return measured_peak_flops(dtype) if device.type == "cpu" else None


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of a GPU's tensors, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # the system's high-water mark sees the peak inside of a step
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return psutil.Process().memory_info().rss


class Throughput:
    """Images per second and model FLOPs utilisation (PaLM, Chowdhery et al., 2022, appendix B) between readings.

    The loop counts its images, says when it does something else, and reads:

    ```
    throughput.step(num_images)
    with throughput.paused():
        evaluate()
    log(**throughput.read())
    ```

    Args:
        flops_per_image: What the method needs, recomputation not included: `TrainingCost.flops_per_image`.
        peak_flops: Operations a second of one device; `None` leaves the utilisation out. See the function
            `peak_flops`.
        num_processes: That train, each on a device and on as many images as this one.
        device: That of this process.
    """

    def __init__(
        self, flops_per_image: float, peak_flops: float | None, num_processes: int, device: torch.device | str
    ):
        self.flops_per_image = flops_per_image
        self.peak_flops = peak_flops
        self.num_processes = num_processes
        self.device = torch.device(device)
        self._restart()

    def _restart(self) -> None:
        self._num_images = 0
        self._started = self._now()

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def step(self, num_images: int) -> None:
        """Counts images that this process trained on."""
        self._num_images += num_images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in this context is no training: evaluations, checkpoints."""
        paused_at = self._now()
        try:
            yield
        finally:
            self._started += self._now() - paused_at

    def read(self) -> dict[str, float]:
        """What was reached since the last reading, or the start. Not to be called in a pause.

        Returns:
            `images_per_second`, of all processes together; `mfu`, the share of the devices' operations, where their
            peak is known; `memory_gib`, the most that this process held since it began, in GiB.
        """
        rate = self._num_images / (self._now() - self._started)
        reading = {"images_per_second": rate * self.num_processes, "memory_gib": peak_memory(self.device) / 2**30}
        if self.peak_flops:
            reading["mfu"] = self.flops_per_image * rate / self.peak_flops
        self._restart()
        return reading

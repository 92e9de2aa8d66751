# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.

import pytest
import torch

from hf_vitreg.training import throughput
from hf_vitreg.training.throughput import (
    Throughput,
    measured_peak_flops,
    peak_flops,
    peak_memory,
    published_peak_flops,
)


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def test_images_of_all_processes_and_their_share_of_the_peak(clock):
    rate = Throughput(flops_per_image=3e9, peak_flops=7e10, num_processes=5, device="cpu")
    for _ in range(4):
        clock.now += 2
        rate.step(11)
    reading = rate.read()
    assert reading["images_per_second"] == pytest.approx(5 * 4 * 11 / 8)
    assert reading["mfu"] == pytest.approx(4 * 11 / 8 * 3e9 / 7e10)


def test_a_reading_is_of_what_was_since_the_one_before(clock):
    rate = Throughput(flops_per_image=1.0, peak_flops=1.0, num_processes=1, device="cpu")
    clock.now += 100
    rate.step(1)
    rate.read()
    clock.now += 2
    rate.step(6)
    assert rate.read()["images_per_second"] == pytest.approx(3)


def test_pauses_do_not_count_even_those_that_fail(clock):
    rate = Throughput(flops_per_image=1.0, peak_flops=None, num_processes=1, device="cpu")
    clock.now += 1
    rate.step(6)
    with rate.paused():
        clock.now += 50
    with pytest.raises(KeyboardInterrupt), rate.paused():
        clock.now += 70
        raise KeyboardInterrupt
    clock.now += 2
    assert rate.read()["images_per_second"] == pytest.approx(2)


def test_without_a_known_peak_there_is_no_utilisation(clock):
    rate = Throughput(flops_per_image=1.0, peak_flops=None, num_processes=1, device="cpu")
    clock.now += 1
    assert set(rate.read()) == {"images_per_second", "memory_gib"}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
    ],
)
def test_published_peaks_go_by_the_names_that_torch_gives(name, tflops):
    assert published_peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A1000", "AMD Instinct"]
)
def test_parts_of_cards_and_strangers_have_no_published_peak(name):
    assert published_peak_flops(name) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_in_the_type_of_the_run(dtype):
    assert measured_peak_flops(dtype, seconds=0.01) > 0
    assert peak_flops(torch.device("cpu"), dtype) > 0


def test_the_peak_of_memory_stays_after_it_is_freed():
    before = peak_memory(torch.device("cpu"))
    values = torch.ones(8 * 2**20)
    del values
    after = peak_memory(torch.device("cpu"))
    torch.ones(2**10)
    assert before <= after <= peak_memory(torch.device("cpu"))

"""What accelerators can do at most, from their makers' datasheets: the one table for plans, benchmarks and ``doctor``.

What is not in the table is None: a share of an unknown peak is "n/a" and never a guess.
"""

from __future__ import annotations

import dataclasses
from typing import Any

LANES = 128
"""Numbers in a row of a TPU's vectors: axes of a multiple of it leave none of them empty."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX counts them (``jax.Device``).

    Attributes:
        name: what people call it.
        kind: ``jax.Device.device_kind``.
        tflops: dense bfloat16 matmuls, 10^12 floating-point operations a second.
        memory: bytes of its main memory.
        bandwidth: bytes a second between the device and that memory.
        clock: cycles a second of what the compiler counts cycles of; None where it counts none.
        link: bytes a second that one device sends to its neighbours, all links of one direction together; None: not
            in this table.
    """

    name: str
    kind: str
    tflops: float
    memory: float
    bandwidth: float
    clock: float | None = None
    link: float | None = None


DEVICES = (
    Device("a100", "NVIDIA A100-SXM4-80GB", 312, 80e9, 2039e9, link=300e9),
    Device("h100", "NVIDIA H100 80GB HBM3", 989, 80e9, 3350e9, link=450e9),
    Device("h200", "NVIDIA H200", 989, 141e9, 4800e9, link=450e9),
    Device("b200", "NVIDIA B200", 2250, 180e9, 8000e9, link=900e9),
    Device("v4", "TPU v4", 275, 32e9, 1228e9, 1.05e9, 150e9),
    Device("v5e", "TPU v5 lite", 197, 16e9, 819e9, 1.5e9, 100e9),
    Device("v5p", "TPU v5", 459, 95e9, 2765e9, 1.75e9, 300e9),
    Device("v6e", "TPU v6 lite", 918, 32e9, 1638e9, 1.75e9, 224e9),
    # A chip is two devices: half of 2307 TFLOP/s, 192 GB and 7380 GB/s each.
    Device("tpu7x", "TPU7x", 1153.5, 96e9, 3690e9, link=300e9),
)
"""Cycles times clock gives the peak of v4 to v6e (v5e: 4 arrays of 128 x 128, 2 operations, 1.5 GHz: 196.6 TFLOP/s).
Links: the interchip or NVLink bandwidth of the datasheet, which adds up both directions, halved."""


def by_kind(kind: str) -> Device | None:
    """The device with this ``device_kind``, or None when it is unknown."""
    return next((device for device in DEVICES if device.kind == kind), None)


def by_name(name: str) -> Device | None:
    """The device that a topology such as ``v5e:4x4`` names before its colon, or None when it is unknown."""
    return next((device for device in DEVICES if device.name == name), None)


def peak_share(flops_per_second: float, device: Any) -> float | None:
    """Share of the peak of a ``jax.Device`` (or its kind), or None when the peak is unknown."""
    known = by_kind(getattr(device, "device_kind", device))
    return None if known is None else flops_per_second / (known.tflops * 1e12)

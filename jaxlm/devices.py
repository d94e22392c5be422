"""Peak performance of accelerators (from the datasheets of their makers), shapes of TPU slices, TPU register sizes.

``jaxlm plan`` and ``jaxlm doctor`` use the table of peaks. ``jaxlm plan`` and ``jaxlm launch`` use the shapes of
slices. ``jaxlm.nn`` uses the register sizes. Unknown values are None and are never guessed. If the peak of a device is
unknown, ``jaxlm plan`` prints "n/a" for a fraction of this peak.
"""

from __future__ import annotations

import dataclasses
from typing import Any

LANES = 128
"""Entries in a row of a TPU vector register. If the size of the last axis of an array is a multiple of this number, the
array needs no padding along this axis."""
SUBLANES = 8
"""Rows of a TPU vector register for float32."""


@dataclasses.dataclass(frozen=True)
class Device:
    """The peak performance of one ``jax.Device``.

    Attributes:
        name: the common name, as in a topology such as ``v5e:4x4``.
        kind: ``jax.Device.device_kind``.
        tflops: peak of dense bfloat16 matmuls, in 10^12 floating-point operations per second.
        memory: bytes of the main memory (HBM).
        bandwidth: bytes per second between the device and its main memory.
        clock: cycles per second. It converts the cycles that the compiler estimates to seconds. None if the compiler
            estimates no cycles, or if the clock is unknown.
        link: bytes per second that one device sends to its neighbors, summed over all links, in one direction; None if
            unknown.
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
    Device("v4", "TPU v4", 275, 32e9, 1228e9, 1.05e9, 300e9),
    Device("v5e", "TPU v5 lite", 197, 16e9, 819e9, 1.5e9, 200e9),
    Device("v5p", "TPU v5", 459, 95e9, 2765e9, 1.75e9, 600e9),
    Device("v6e", "TPU v6 lite", 918, 32e9, 1638e9, 1.75e9, 400e9),
    # JAX shows one chip as two devices. Each has half of the 2307 TFLOP/s, 192 GB and 7380 GB/s.
    Device("tpu7x", "TPU7x", 1153.5, 96e9, 3690e9, link=300e9),
)
"""The devices with a known peak. For v4 to v6e, the peak is ``clock`` multiplied by the operations per cycle. For
example, a v5e has 4 matrix units of 128 x 128 cells. Each cell executes 2 operations per cycle. At 1.5 GHz, this gives
196.6 TFLOP/s.

``link`` is half of the bidirectional interchip or NVLink bandwidth in the datasheet, so it is the bandwidth of one
direction. (Older pages about TPUs state one direction in Gbit/s: 1600 for a v5e, which is 200 GB/s.) For TPU7x, it is a
quarter of the bidirectional bandwidth of a chip (1200 GB/s), because a chip is two devices."""

TPU_SHAPES = dict.fromkeys(("v5e", "v6e"), ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"))
"""All shapes of TPU slices in Google Cloud, for the generations whose slices are two-dimensional."""


def device_by_kind(kind: str) -> Device | None:
    """The device with this ``device_kind``, or None if it is not in the table."""
    return next((device for device in DEVICES if device.kind == kind), None)


def device_by_name(name: str) -> Device | None:
    """The device with this name, such as ``v5e`` (from the topology ``v5e:4x4``), or None if it is not in the table."""
    return next((device for device in DEVICES if device.name == name), None)


def peak_fraction(flops_per_second: float, device: Any) -> float | None:
    """``flops_per_second`` as a fraction of the peak of ``device``; None if the device is not in the table.

    Args:
        device: a ``jax.Device``, or its ``device_kind``.
    """
    known = device_by_kind(getattr(device, "device_kind", device))
    return None if known is None else flops_per_second / (known.tflops * 1e12)

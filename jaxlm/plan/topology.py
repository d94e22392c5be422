"""Topologies: the devices that a plan compiles for. This machine need not have these devices.

The extra ``tpu`` of the package installs the TPU compiler (libtpu), which needs no TPU. The extra ``cuda13`` installs
the GPU compiler, which needs no GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from jaxlm import extras, host
from jaxlm.devices import TPU_SHAPES, Device, device_by_kind, device_by_name
from jaxlm.plan import kernels

TPUS = {
    "v5e": ", ".join(TPU_SHAPES["v5e"][1:]),  # libtpu rejects the first shape, 1x1
    "v5p": "2x2x1, 2x2x2, 4x4x4",
    "v6e": ", ".join(TPU_SHAPES["v6e"][1:]),
    "tpu7x": "2x2x1, 2x2x2",
}
"""The TPU generations that a plan supports, and the usual shapes of each. libtpu accepts some other shapes too."""
GPUS = ("h100",)
LOCAL_TOPOLOGY = "local"
"""The name of the topology with the devices of this machine. In a run with several processes, it has the devices of
all processes."""

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu waits for an answer from the metadata server of Google Cloud
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # allows several processes to plan at the same time; none of them uses a TPU
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices that a plan compiles for.

    Attributes:
        devices: all devices of the topology. They are of one kind.
        device: the peak performance of one device (FLOP/s, memory, bandwidths); None if ``jaxlm.devices`` does not
            list this kind of device.
    """

    devices: tuple[jax.Device, ...]
    device: Device | None


def prepare_environment() -> None:
    """Set the environment variables for planning. They have no effect if libtpu is already loaded.

    If ``JAX_PLATFORMS`` is not set, the function also selects the CPU as JAX's platform, so that the process does not
    use the accelerators of the machine. This has no effect if JAX has already initialized a backend. ``jaxlm plan`` and
    :func:`get_topology` call this function, but not for the topology ``local``.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    kernels.dump_schedules()
    if os.environ.get("JAX_PLATFORMS") is None:
        host.select_cpu()


def known_topologies_text() -> str:
    """A text that lists the known topologies, for error messages."""
    return "; ".join([*(f"{name}:SHAPE with {shapes}" for name, shapes in TPUS.items()), "h100:COUNT", LOCAL_TOPOLOGY])


def get_topology(name: str) -> Topology:
    """The topology called ``name``, such as ``v5e:4x4``, ``v5p:2x2x1``, ``v6e:2x2``, ``h100:8``, or ``local``.

    Raises:
        ValueError: there is no such topology, or the compiler rejects its shape.
        ImportError: the compiler for the topology is not installed; the message says how to install it.
    """
    if name == LOCAL_TOPOLOGY:
        return Topology(tuple(jax.devices()), device_by_kind(jax.devices()[0].device_kind))
    kind, colon, shape = name.partition(":")
    if not colon or not shape or kind not in (*TPUS, *GPUS):
        raise ValueError(f"no topology is called {name!r}: known are {known_topologies_text()}")
    if kind in GPUS:
        return _gpu_topology(name, kind, shape)
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"topology {name!r}: a {kind} has a shape such as {TPUS[kind].partition(',')[0]}, not {shape!r}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(f"topology {name!r} needs the TPU compiler, libtpu: {extras.install_command('tpu')}")
    prepare_environment()
    return Topology(_devices_of(name, "tpu", topology_name=name), device_by_name(kind))


def _gpu_topology(name: str, kind: str, shape: str) -> Topology:
    if not shape.isdecimal() or int(shape) < 1:
        raise ValueError(f"topology {name!r}: write the number of GPUs of one host, as in {kind}:8")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ImportError(f"topology {name!r} needs the GPU compiler, 4 GB: {extras.install_command('cuda13')}")
    prepare_environment()
    config = {"topology_name": kind, "topology": f"1x1x{shape}", "target_config": _H100_TARGET_CONFIG}
    return Topology(_devices_of(name, "cuda", **config), device_by_name(kind))


def _devices_of(name: str, platform: str, **arguments: Any) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(platform=platform, **arguments).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the compiler rejects topology {name!r} ({reason}): known are {known_topologies_text()}"
        ) from error


_H100_TARGET_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""A ``GpuTargetConfigProto`` of an H100 SXM. XLA's GPU compiler needs it to compile without the GPU."""

"""Block sizes and limits of :mod:`jaxlm.nn.choices` whose best values differ between CPUs, and the file that sets them.

The defaults of :class:`CpuChoices` were measured on AMD processors. ``jaxlm calibrate`` measures several values of each
field on this machine (:mod:`jaxlm.nn.calibration`) and writes the fastest values to a file (:class:`Calibration`). A
process uses this file only if the environment variable ``JAXLM_CHOICES`` names it. The process reads the file once.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import jaxlib.version

from jaxlm import config, host, json_files

VARIABLE = "JAXLM_CHOICES"
"""The environment variable with the path of a calibration. If it is not set or is empty, the defaults are used."""

MAX_BLOCKWISE_QUERIES = 1024
"""Maximum of ``min_blockwise_queries``, because jaxlm guarantees O(T) memory for T >= 1024."""


@dataclasses.dataclass(frozen=True)
class CpuChoices:
    """Block sizes and limits for a CPU. Other valid values change results only by rounding.

    Raises:
        ValueError: a value is below 1, a chunk is not a power of two, or ``min_blockwise_queries`` is above
            ``MAX_BLOCKWISE_QUERIES``.
    """

    min_blockwise_queries: int = 128
    """Minimum number of queries for ``blockwise`` attention on one CPU device, without biases.

    CPU time in ms (16,384 queries in all rows together, 2 causal heads of width 32; AMD EPYC (Zen 4), jaxlib 0.10.2,
    median of 7). In each pair of numbers, the first is for ``reference`` and the second for ``blockwise``. The rows
    "both" are the forward and the backward pass together:

        queries per row          64            128           256
        forward, 1 core     13.0    8.5    26.4   11.2   55.2   17.2
        both, 1 core        29.2   26.8    61.5   42.5  124.8   73.9
        forward, 2 cores    10.5    8.8    23.4   11.6   37.6   22.0
        both, 2 cores       25.2   26.5    60.1   49.8   97.1   81.9
    """
    max_shared_mask_queries: int = 256
    """Maximum number of queries for which the heads share the mask of a block, in ``blockwise`` attention with a loop
    over heads (``choices.share_mask_between_heads``).

    CPU time in ms of the forward and the backward pass together, with a mask for each head and with a shared mask
    (causal, heads of width 64; AMD EPYC (Zen 4), one core, jaxlib 0.10.2, fastest of 6). "documents": three documents
    per row, with segment ids. "no segments": without segment ids.

        rows, queries, heads               8, 256, 12    4, 512, 8    2, 1024, 12
        documents, a mask for each head           117          108            150
        documents, a shared mask                   86           79            185
        no segments, a mask for each head          79           79            211
        no segments, a shared mask                 92           78            217

    With jaxlib 0.12 and 512 queries, attention with a shared mask takes 98 ms instead of 116 (documents), but 94
    instead of 80 (no segments) and 120 instead of 102 (documents, not causal).
    """
    recurrence_chunk_rows: int = 512
    """Number of rows (steps times batch size) of the matmuls in a chunk of a recurrent layer on a single CPU device.

    CPU time in ms of an LSTM with T steps, batch size B and hidden width H, forward / forward and backward together
    (jaxlib 0.10.2, AMD Zen 5):

        rows              128      256      512      1024     all
        T128 B32 H512     103/344  98/311   92/312   91/306   109/326
        T256 B64 H256     100/388  100/361  99/343   100/350  138/401
    """
    linear_attention_chunk: int = 64
    """Steps of a chunk of ``linear_attention``, ``ssd`` and ``mlstm``, a power of two.

    CPU time in ms, forward and backward together (jaxlib 0.10.2, two cores of an AMD EPYC, Zen 5):

                                                    chunk 16    chunk 32    chunk 64    chunk 128
        linear_attention B2 T1024 H8 K64            26.9        23.7        21.1        26.3
        the same, one decay per channel             40.4        39.4        32.6        47.1
        ssd B1 T512 H24 K128 V64                    25.0        21.5        18.3        22.5

    A training step of a small xLSTM (12 layers of width 768, 2 x 512 tokens) takes 2.31 instead of 2.42 s with 64
    instead of 32 steps. A training step of Mamba-2 130M takes 1.9 s with either number.
    """
    gated_delta_rule_chunk: int = 32
    """Steps of a chunk of ``gated_delta_rule``, a power of two."""
    generalized_delta_rule_chunk: int = 16
    """Steps of a chunk of ``generalized_delta_rule``, a power of two. With one decay per channel, the scores of a chunk
    need one matmul for each block size 1, 2, 4, ... (``matrix_state.pair_scores_and_decays``), so large chunks are more
    expensive than with one decay per head.

    CPU time in ms, forward / forward and backward together (B 1, T 512, H 8, K 64; jaxlib 0.10.2, two busy cores; best
    of six):

        reference    chunk 8    chunk 16    chunk 32
        11/2140      36/228     38/216      59/240

    In a later measurement of forward and backward together (the same shapes, best of four), chunks of 8, 16, 32 and 64
    steps take 112, 72, 85 and 106 ms with a bound of the log decays (-0.61), and 130, 139, 150 and 185 ms without a
    bound.
    """
    max_loop_state: int = 2**16
    """Maximum number of entries B * H * K * V of the state for which ``linear_attention`` with one decay per head runs
    as a loop over steps. It runs as a loop only without a gradient and for K >= 64.

    Without a gradient, ``linear_attention`` with one decay per channel and ``generalized_delta_rule`` run as a loop for
    every size of the state (``choices.loops_without_gradient``). Time in ms without a gradient, loop / chunks (jaxlib
    0.10.2, two cores of an AMD EPYC, Zen 4; one decay per head, or one per channel of the keys):

        B  T     H   K    V      entries    per head         per channel      generalized_delta_rule
        1  64    4   64   64     2**14      0.14 / 0.25      0.18 / 0.31      0.29 / 0.73
        8  256   4   32   32     2**15      3.6 / 2.9        4.4 / 5.7        3.4 / 9.8
        1  1024  8   64   64     2**15      3.6 / 5.1        4.4 / 9.2        6.9 / 20.3
        2  1024  8   64   64     2**16      8.9 / 10.7       10.7 / 15.9      15.4 / 29.8
        8  256   8   64   64     2**18      14.2 / 11.5      15.0 / 16.3      18.0 / 27.8
        1  1024  16  128  128    2**18      47.5 / 38.5      56.6 / 48.6      76.0 / 102.1
        8  512   16  64   128    2**20      103 / 119        111 / 137        159 / 214
    """
    decode_partial_sums: int = 8
    """Number of partial sums into which ``sums`` (``choices.decode_products``) splits each product of a query and a
    key. Elementwise operations compute the partial sums with vector instructions, then a matmul adds them."""
    max_few_rows: int = 32
    """Maximum number of rows for which a float32 product with a table of embeddings has the table as its first operand.

    CPU time in ms of four products with tables of 10,000 x 650 (two cores of an AMD EPYC (Zen 4), jaxlib 0.10.2):

        rows                       1      2      8     16     32     64
        hidden @ table.T         4.4   10.1   15.6   19.3   28.6   41.1
        (table @ hidden.T).T     6.4    8.0    9.7   12.9   20.8   39.4
    """
    max_logits: int = 2**24
    """Maximum number of logits that exist at the same time on a CPU device: 64 MiB in float32. With fewer logits, the
    matmuls have too few rows. With more, allocating new memory is slow. If the process keeps its freed memory
    (``host.keep_freed_memory``), ``choices.max_logits`` doubles the number."""

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        config.check_min(1, **values)
        for name, value in values.items():
            if name.endswith("_chunk") and value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two, such as 32 or 64")
        if self.min_blockwise_queries > MAX_BLOCKWISE_QUERIES:
            raise ValueError(
                f"min_blockwise_queries={self.min_blockwise_queries} must be at most {MAX_BLOCKWISE_QUERIES}"
            )

    def changes(self) -> str:
        """The values that are not defaults, as text; "all defaults" if there are none."""
        defaults, values = dataclasses.asdict(CpuChoices()), dataclasses.asdict(self)
        changed = [f"{name}={value}" for name, value in values.items() if value != defaults[name]]
        return ", ".join(changed) or "all defaults"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The content of a file that ``jaxlm calibrate`` writes: the values, and where and when they were measured."""

    processor: str
    """The result of ``host.processor_model``."""
    cores: int
    """Number of cores of the measuring process. A process with another number of cores may use the file, too."""
    jaxlib: str
    """Version of jaxlib."""
    date: str
    """Day of the measurement, such as 2026-11-30."""
    values: CpuChoices
    """The fastest values. A value that the file lacks is the default."""


def active_calibration() -> Calibration | None:
    """The content of the file that ``JAXLM_CHOICES`` names. None if the variable is not set or is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is a directory; or the file is damaged, has an unknown name or an invalid value, or was
            measured on another processor or with another version of jaxlib.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    path = Path(os.path.expanduser(name))
    fix = f"run jaxlm calibrate --output {shlex.quote(str(path))} on this machine, or unset {VARIABLE}"
    if path.is_dir():
        raise ValueError(f"{VARIABLE}={name} is a directory: set it to a file, or unset it")
    if not path.is_file():
        raise FileNotFoundError(f"{VARIABLE}={name} is not a file: {fix}")
    try:
        calibration = config.from_json(Calibration, json_files.read_object(path), "calibration")
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={name}: {error}; {fix}") from error
    for what, measured, present in (
        ("processor", calibration.processor, host.processor_model()),
        ("jaxlib", calibration.jaxlib, jaxlib.version.__version__),
    ):
        if measured != present:
            raise ValueError(f"{VARIABLE}={name} was measured with {what} {measured}, but this is {present}: {fix}")
    return calibration


_scope: contextvars.ContextVar[CpuChoices | None] = contextvars.ContextVar("jaxlm_cpu_choices", default=None)


def cpu_choices() -> CpuChoices:
    """The values of the innermost :func:`use`; otherwise those of :func:`active_calibration`, or the defaults.

    Raises:
        FileNotFoundError, ValueError: as in :func:`active_calibration`.
    """
    values = _scope.get()
    return _process_values() if values is None else values


@functools.cache
def _process_values() -> CpuChoices:
    calibration = active_calibration()
    return CpuChoices() if calibration is None else calibration.values


@contextlib.contextmanager
def use(values: CpuChoices) -> Iterator[None]:
    """A context in which :func:`cpu_choices` returns ``values``. Functions that are already traced do not change."""
    token = _scope.set(values)
    try:
        yield
    finally:
        _scope.reset(token)

"""All choices that depend on the platform, the sharding or the shape, with the measurements behind them.

Each primitive has a reference and faster implementations. The functions of this module say which one runs if the caller
does not choose. No other module of ``jaxlm.nn`` and ``jaxlm.models`` asks for the platform. Estimates of the TPU
compiler are in docs/labbook.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax

from jaxlm import host, sharding
from jaxlm.devices import LANES

PLATFORM = {"splash": "tpu", "pallas": "tpu", "cudnn": "gpu"}
"""The platform of each implementation that runs on one platform only."""


def wrong_platform(implementation: str | None) -> str | None:
    """Why the implementation cannot run on the platform, as the end of a sentence; None if it can."""
    platform = sharding.platform()
    needed = PLATFORM.get(implementation or "", platform)
    return None if needed == platform else f"is for a {needed}, and this is compiled for a {platform}"


def _is_single_cpu() -> bool:
    """Whether the computation runs on one CPU device. Several devices need operations that keep the sharding."""
    return sharding.platform() == "cpu" and sharding.active() is None


# ------------------------------------------------------------------------------------------------------ attention

MIN_BLOCKWISE_QUERIES = 256
"""From this number of queries on, ``blockwise`` is faster. jaxlm also requires O(T) memory from T = 1024 on."""
MIN_BIASED_PALLAS_QUERIES = 64
"""From this number of queries on, biases are computed by ``pallas`` on a TPU. Its smallest block has 128 queries."""
MAX_WHOLE_ROW_KEYS = 1024
"""Up to this number of keys, a TPU is fastest with whole rows, by its compiler's estimate: ``splash`` makes one block
of so few keys, so that it does not skip anything that a causal mask hides."""
MAX_DECODE_QUERIES = 8
"""Maximum number of queries for ``decode``."""
MIN_DECODE_SLOTS = 128
"""The minimum number of slots of a cache that ``decode`` reads. Each further branch reads twice as many."""

AttentionImplementation = Literal["reference", "blockwise", "decode", "splash", "pallas", "cudnn"]


def attention(
    queries: int, keys: int, *, dense_bias: bool, biases: bool, reasons: dict[str, str | None]
) -> AttentionImplementation:
    """The fastest implementation of attention that is known for the arguments.

    Args:
        dense_bias: whether there is a bias as a dense array.
        biases: whether there are biases that are computed tile by tile.
        reasons: why an implementation does not support the arguments; None if it supports them.
    """
    # Few queries and many keys: a decoder over its cache or over a source.
    is_decoding = queries <= MAX_DECODE_QUERIES and keys > 2 * MIN_DECODE_SLOTS
    if is_decoding and reasons["decode"] is None:
        return "decode"
    platform = sharding.platform()
    if biases and queries >= MIN_BIASED_PALLAS_QUERIES and platform == "tpu" and reasons["pallas"] is None:
        return "pallas"
    if queries < MIN_BLOCKWISE_QUERIES or dense_bias:
        return "reference"
    kernels: tuple[AttentionImplementation, ...] = ("splash", "pallas")
    for name in (*(kernels if keys > MAX_WHOLE_ROW_KEYS else kernels[::-1]), "cudnn"):
        if platform == PLATFORM[name] and reasons[name] is None:
            return name
    return "blockwise"


def loop_over_heads() -> bool:
    """Whether ``blockwise`` attention computes one head after the other.

    On a CPU, the matmuls are then two-dimensional and the temporaries stay in the cache. Otherwise all heads are
    computed together.
    """
    return _is_single_cpu()


def merge_heads_for_decoding(key_heads: int, num_shards: int) -> bool:
    """Whether ``decode`` computes all heads of a device in one matmul. The key heads must divide over the devices."""
    return sharding.platform() in ("cpu", "tpu") and key_heads % num_shards == 0


def lane_padding(width: int) -> int:
    """The padding of an axis of a cache to a multiple of LANES on a TPU; 0 on other platforms.

    Without padding, the TPU compiler transposes the whole cache in every layer, so that the slots are the last axis
    instead of the heads.
    """
    return -width % LANES if sharding.platform() == "tpu" else 0


def shift_rows_by_reshape() -> bool:
    """Whether each row is shifted by a reshape. On a CPU, the gradient of the reshape takes three times as long."""
    return sharding.platform() != "cpu"


MIN_ABSORBED_CONTEXT = 128
"""The minimum B * S for absorbed attention. With fewer keys, transposing the weights on a CPU takes longer than
projecting the keys."""


def absorbed_attention(q_BTHK: jax.Array, context_BSD: jax.Array, *, dropout: float, key: jax.Array | None) -> bool:
    """Whether attending to the cached inputs directly is cheaper than projecting keys and values.

    Absorbed attention (``jaxlm.nn.attention.memory``) computes scores, the weighted mean and the distance bias, with
    ``B T S H D`` multiplications each. Otherwise, keys, values and the table of distances are projected, with about
    ``B S D H K`` each.

    Args:
        q_BTHK, context_BSD: the queries, and the inputs of keys and values.
        dropout, key: of the attention probabilities. Absorbed attention does not support dropout.
    """
    if key is not None and dropout > 0.0:
        return False
    (B, T, _, K), S = q_BTHK.shape, context_BSD.shape[1]
    return 4 * T <= K and B * S >= MIN_ABSORBED_CONTEXT


def fused_qkv() -> bool:
    """Whether queries, keys and values are one matmul.

    Attention kernels of accelerators need them as separate arrays: slicing the output of a single matmul would copy it.
    """
    return sharding.platform() == "cpu"


# ---------------------------------------------------------------------------------- recurrence, scans, convolutions

CHUNK_ROWS = 512
"""The number of rows of the matmuls of a recurrent chunk on a CPU, steps times B.

CPU time in ms of an LSTM, forward / forward and backward (jaxlib 0.10.2, AMD Zen 5):

    rows              128      256      512      1024     all
    T128 B32 H512     103/344  98/311   92/312   91/306   109/326
    T256 B64 H256     100/388  100/361  99/343   100/350  138/401
"""


def recurrence_chunk(batch: int, steps: int) -> int:
    """The number of steps of a chunk of an LSTM or GRU: all steps, or fewer on a CPU.

    On a CPU, the arrays of a chunk should fit into the cache, and allocation is slow (0.4 ms/MB for arrays over 32 MB).
    """
    return max(1, CHUNK_ROWS // batch) if _is_single_cpu() else steps


def linear_scan() -> Literal["sequential", "chunked"]:
    """The implementation of ``linear_scan``: in place on a CPU; in chunks on accelerators, where rounds are slow."""
    return "sequential" if sharding.platform() == "cpu" else "chunked"


MIN_CHUNKED_STEPS = 8
"""Minimum number of steps for which ``linear_attention`` runs in chunks."""
LINEAR_ATTENTION_CHUNK = {"cpu": 32}
"""Steps of a chunk of ``linear_attention``, by platform. The matrix units of other platforms need more rows."""
LINEAR_ATTENTION_CHUNK_ACCELERATOR = 128


def linear_attention(steps: int) -> Literal["reference", "chunked"]:
    """The implementation of ``linear_attention``."""
    return "chunked" if steps >= MIN_CHUNKED_STEPS else "reference"


def linear_attention_chunk() -> int:
    """The number of steps of a chunk of ``linear_attention``."""
    return LINEAR_ATTENTION_CHUNK.get(sharding.platform(), LINEAR_ATTENTION_CHUNK_ACCELERATOR)


def depthwise_convolution(segment_ids: Any) -> Literal["reference", "shifts"]:
    """The implementation of ``depthwise_convolution``. Only ``shifts`` supports segments."""
    return "shifts" if sharding.platform() == "cpu" or segment_ids is not None else "reference"


def sum_depthwise_gradient_in_blocks(blocks: int) -> bool:
    """Whether the gradient of depthwise weights is summed over blocks of time.

    One sum per tap over the whole input would read the input once per tap, which is slow on a CPU.
    """
    return _is_single_cpu() and blocks >= 2


# ------------------------------------------------------------------------------------------------- linear, losses


def bias_gradient_by_matmul(bias: jax.Array) -> bool:
    """Whether the gradient of a bias is a matmul with rows of ones.

    A bias with several axes belongs to attention heads. On a TPU, an attention kernel computes the gradient of the
    output. So there is no matmul into which XLA could fuse the sum over rows that the gradient of the bias needs. The
    matrix unit computes this sum faster than the vector unit, which needs a separate pass (GPT-2, by the TPU compiler's
    estimate: 0.09 instead of 0.35 M cycles).
    """
    return bias.ndim > 1 and sharding.platform() == "tpu"


MIN_WEIGHT_GRADIENT_BLOCKS = 4
"""If there are fewer blocks of rows than this, the gradient of a weight is one matmul instead of a sum over blocks."""


def weight_gradient_block_rows(num_outputs: int) -> int:
    """Rows of a block: 2 MiB of the output gradient, but at least 1024, because matmuls with fewer rows are slow."""
    return max(1024, 2**19 // num_outputs)


def weight_gradient_blocks(rows: int, num_inputs: int, num_outputs: int) -> int:
    """Number of full blocks of rows over which the gradient of a weight is summed; 0: the gradient is one matmul.

    On a CPU, if the output is narrower than the input, XLA fuses the transpose of the output gradient with its
    computation, in an order of memory accesses that does not reuse cache lines. A loop over blocks transposes a block
    that fits into the cache. This saves a fifth of a step of VDCNN, and a twentieth of a step of BERT with 8192 rows.
    """
    if num_outputs >= num_inputs or not _is_single_cpu():
        return 0
    count = rows // weight_gradient_block_rows(num_outputs)
    return count if count >= MIN_WEIGHT_GRADIENT_BLOCKS else 0


MAX_LOGITS = {"cpu": 2**24}
"""Number of logits that exist at a time on a CPU device: 64 MiB in float32. With fewer logits the matmuls have too few
rows; with more, allocating new memory is slow. The number is doubled if the process keeps its freed memory
(``host.keep_freed_memory``)."""
MAX_LOGITS_ACCELERATOR = 2**27
"""The same number on accelerators, 512 MiB. Each chunk reads and writes the gradient of the whole head, so many chunks
are slow: with 2**24 logits, the 98 chunks of a GPT-2 step took as long as the rest of the step."""


def max_logits() -> int:
    """The number of logits that may exist at a time, on all devices together."""
    platform = sharding.platform()
    keeps_memory = platform == "cpu" and host.keeps_freed_memory()
    per_device = MAX_LOGITS.get(platform, MAX_LOGITS_ACCELERATOR) * (2 if keeps_memory else 1)
    return per_device * sharding.num_shards(("batch", None, "vocab"))


def loss_chunk(steps: int, longest: int) -> int:
    """The number of steps of a chunk of a loss, at most ``longest``; all steps if one chunk is enough.

    On a CPU, all chunks have about the same length. On an accelerator the length is a multiple of ``LANES`` or, below
    that, a power of two: by the TPU compiler's estimate, chunks of 147 steps take a sixth more time than chunks of 128.
    """
    if longest >= steps:
        return steps
    if sharding.platform() == "cpu":
        return -(-steps // -(-steps // longest))
    return longest - longest % min(LANES, 2 ** (longest.bit_length() - 1))


MIN_LOSS_BLOCKS = 16
"""``selected_cross_entropy`` has at least this many blocks if all weights are nonzero. The last block is padded, and
the smaller the blocks are, the less work the padding takes."""
MIN_LOSS_BLOCK_ROWS = {"cpu": 32}
"""Minimum number of rows of such a block on a device, by platform. Matmuls with fewer rows are slow."""
MIN_LOSS_BLOCK_ROWS_ACCELERATOR = LANES


def loss_block_rows(rows: int, num_logits: int) -> int:
    """The number of rows of a block of ``selected_cross_entropy``, a multiple of the number of shards of the batch."""
    shards = sharding.num_shards(("batch",))
    min_rows = MIN_LOSS_BLOCK_ROWS.get(sharding.platform(), MIN_LOSS_BLOCK_ROWS_ACCELERATOR) * shards
    block_rows = math.ceil(rows / (MIN_LOSS_BLOCKS * min_rows)) * min_rows
    return max(min(block_rows, max_logits() // num_logits, rows) // shards, 1) * shards


# --------------------------------------------------------------------------------------------------------- models


def prevent_cse_in_remat(*, unrolled: bool) -> bool:
    """Whether rematerialization prevents that XLA merges the recomputation with the original computation (CSE).

    That happens only in an unrolled loop over layers. On a CPU, CSE is not prevented: XLA reorders an unrolled loop
    there, so recomputation would take time and save no memory (docs/labbook.md).
    """
    return unrolled and sharding.platform() != "cpu"

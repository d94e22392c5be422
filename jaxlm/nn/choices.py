"""Choices of implementations and block sizes by platform, sharding and shape, with the measurements that justify them.

Many functions of ``jaxlm.nn`` have a reference implementation and faster implementations. If the caller does not choose
an implementation, this module chooses it. No other module of ``jaxlm.nn`` or ``jaxlm.models`` makes choices by
platform. docs/labbook.md has the estimates of the TPU compiler. The block sizes and limits whose best values differ
between CPUs are in :class:`jaxlm.nn.cpu_choices.CpuChoices`, with their measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm import host, sharding
from jaxlm.devices import LANES
from jaxlm.nn import lazy_pallas
from jaxlm.nn.cpu_choices import cpu_choices
from jaxlm.nn.weight_record import is_recording

PLATFORM = {"splash": "tpu", "pallas": "tpu", "cudnn": "gpu"}
"""The platform of each implementation that runs on one platform only."""


def wrong_platform(implementation: str) -> str | None:
    """Why the implementation cannot run on the current platform (``sharding.platform``), as a part of an error message;
    None if it can run."""
    platform = sharding.platform()
    needed = PLATFORM.get(implementation, platform)
    return None if needed == platform else f"runs only on {needed}, but this computation is compiled for {platform}"


def check_implementation(
    function: str, implementation: str | None, names: Any, reasons: Mapping[str, str | None] | None = None
) -> None:
    """Check that an implementation exists and that it supports the arguments and the platform.

    Args:
        function: the name of the function in error messages.
        implementation: the name of the implementation. None (the fastest known one) is always accepted.
        names: the ``Literal`` of all implementations.
        reasons: for an implementation, why it does not support the arguments, or None if it supports them. An
            implementation without an entry supports them.

    Raises:
        ValueError: the implementation is unknown, or it does not support the arguments or the platform.
    """
    if implementation is None:
        return
    if implementation not in get_args(names):
        raise ValueError(
            f"no {function} implementation {implementation!r}: choose from {', '.join(get_args(names))}, or leave the "
            "implementation out"
        )
    if reason := (reasons or {}).get(implementation) or wrong_platform(implementation):
        raise ValueError(f"{function} implementation {implementation!r} {reason}: leave the implementation out")


def _is_single_cpu() -> bool:
    """Whether the computation runs on a single CPU device: with neither a ``Sharding.scope`` nor a mesh with Explicit
    axes.

    Computations on several devices need operations that keep the sharding of arrays.
    """
    return sharding.platform() == "cpu" and sharding.active() is None and not sharding.is_explicit()


def _is_new_tpu() -> bool:
    """Whether the computation is compiled for a TPU from v5 on. Some kernels were compiled only for these TPUs."""
    return sharding.platform() == "tpu" and not sharding.device_kind().startswith(lazy_pallas.OLD_TPUS)


def _is_v6e() -> bool:
    return sharding.device_kind().startswith("TPU v6")


# ------------------------------------------------------------------------------------------------------ attention

MIN_BLOCKWISE_QUERIES = 256
"""Minimum number of queries for ``blockwise``, ``splash``, ``pallas`` and ``cudnn``. With fewer queries, ``reference``
is faster. Two cases have another minimum: attention without biases on a single CPU device
(``CpuChoices.min_blockwise_queries``), and the case of ``MIN_PALLAS_QUERIES``. The value must be at most 1024, because
jaxlm guarantees O(T) memory for T >= 1024."""
MIN_PALLAS_QUERIES = 64
"""Minimum number of queries for ``pallas`` on a TPU if there are biases or at most ``MAX_PALLAS_KEYS`` keys. The kernel
pads queries to a multiple of 128."""
MAX_PALLAS_KEYS = 1024
"""Maximum number of keys for which ``pallas`` is faster than ``splash`` (TPU compiler's estimate). ``pallas`` computes
whole rows of scores. With so few keys, ``splash`` has one block of keys, so it cannot skip masked blocks."""
MAX_DECODE_QUERIES = 8
"""Maximum number of queries for which ``decode`` is chosen."""
MIN_DECODE_SLOTS = 128
"""Minimum number of cache slots that a branch of ``decode`` reads. ``decode`` compiles several branches, each of which
reads about twice as many slots as the branch before it. For a cache with at most twice this number of slots, there is
only one branch, which reads all slots. ``decode`` is chosen only for longer caches."""

AttentionImplementation = Literal["reference", "blockwise", "decode", "splash", "pallas", "cudnn"]


def attention(queries: int, keys: int, *, biases: bool, reasons: dict[str, str | None]) -> AttentionImplementation:
    """The fastest known implementation of attention for the arguments.

    Args:
        biases: whether there are biases.
        reasons: for each implementation except ``reference`` and ``blockwise``, why it does not support the arguments;
            None if it supports them.
    """
    # Few queries and many keys occur when a decoder attends to its cache or to a source text.
    is_decoding = queries <= MAX_DECODE_QUERIES and keys > 2 * MIN_DECODE_SLOTS
    if is_decoding and reasons["decode"] is None:
        return "decode"
    platform = sharding.platform()
    is_for_pallas = queries >= MIN_PALLAS_QUERIES and (biases or keys <= MAX_PALLAS_KEYS)
    if platform == "tpu" and is_for_pallas and reasons["pallas"] is None:
        return "pallas"
    min_queries = MIN_BLOCKWISE_QUERIES
    if _is_single_cpu() and not biases:
        min_queries = cpu_choices().min_blockwise_queries
    if queries < min_queries:
        return "reference"
    for name in ("splash", "pallas", "cudnn"):
        if platform == PLATFORM[name] and reasons[name] is None:
            return name
    return "blockwise"


def causal_tile() -> int:
    """The maximum number of queries of a tile if ``pallas`` splits a block of queries into causal tiles.

    Smaller tiles compute fewer masked scores, but use the matrix unit less well. With tiles of 512 queries, the forward
    kernel has 0.83 times as many bundles as with tiles of 256, and the backward kernel 0.93 times (GPT-2, 1,024 tokens,
    v6e, TPU compiler). On a v5e, the numbers are 0.98 and 1.10.
    """
    return 512 if _is_v6e() else 256


def loop_over_heads() -> bool:
    """Whether ``blockwise`` attention computes one head after the other.

    The result is True on a single CPU device, because the matmuls are then two-dimensional and the temporaries stay in
    the CPU cache. Otherwise, all heads are computed together.
    """
    return _is_single_cpu()


def share_mask_between_heads(queries: int, *, has_integers: bool) -> bool:
    """Whether all heads share one mask per block, in ``blockwise`` attention with a loop over heads.

    Without a shared mask, XLA computes the mask again in each operation that reads the scores. It uses no vector
    instructions for this if the mask depends on arrays of integers. A shared mask is computed once per block, before a
    loop over the heads. But each block then reads and updates arrays of all heads. With many queries, these arrays do
    not fit into the CPU cache.

    Args:
        has_integers: whether the mask depends on arrays of integers (segments or orders).
    """
    return has_integers and queries <= cpu_choices().max_shared_mask_queries


DecodeProducts = Literal["kernel", "sums", "merged", "reference"]


def decode_products(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: DTypeLike, shards: int
) -> DecodeProducts:
    """How ``decode`` computes the products of queries, keys and values.

    ``jaxlm.nn.attention.decode`` describes the four ways. Time in ms of ``merged`` and ``sums``, for one query per row
    (one core of an AMD EPYC, Zen 4):

        rows  slots  heads  width  dtype       jaxlib 0.10.2   jaxlib 0.12
        2     96     8      64     float32     0.069, 0.073    0.075, 0.080
        2     576    12     64     float32     0.58, 0.42      0.57, 0.44
        8     96     12     64     float32     0.47, 0.31      0.44, 0.31
        8     576    12     64     float32     3.7, 2.3        3.7, 2.4
        32    128    8      64     float32     1.8, 1.3        1.6, 1.1
        8     1,024  16     128    float32     18.6, 17.6      17.8, 15.2
        8     300    4      20     float32     0.083, 0.136    0.096, 0.146
        8     576    12     64     bfloat16    2.6, 4.4        2.6, 4.5

    With one row, XLA of jaxlib 0.10 does not use vector instructions for the weighted sums of the values: ``sums`` then
    takes 4.4 ms for 1,023 slots, and ``merged`` 0.27.

    Args:
        q_shape: [B, T, H, K].
        k_shape: [B, E, G, K], where E is the number of slots that are read.
        dtype: dtype of the keys.
        shards: number of devices that split the heads. ``sums`` needs 1, ``merged`` and ``kernel`` need a divisor of G.
    """
    (B, T, H, _), G = q_shape, k_shape[2]
    if sharding.platform() == "cpu" and dtype == jnp.float32 and T == 1 and H == G >= 8 and B > 1 and shards == 1:
        return "sums"
    if G % shards:
        return "reference"
    # The code of the kernel and its arrays in VMEM grow with the number of queries. The TPU compiler rejects a kernel
    # with float16.
    if _is_new_tpu() and T <= MAX_DECODE_QUERIES and dtype != jnp.float16:
        return "kernel"
    return "merged" if sharding.platform() in ("cpu", "tpu") else "reference"


def decode_partial_sums(width: int) -> int:
    """The number of partial sums into which ``sums`` splits each product of a query and a key of this width."""
    return math.gcd(width, cpu_choices().decode_partial_sums)


MAX_DENSE_BIAS_TOKENS = 512
"""Maximum number of queries and of keys for which :func:`dense_shared_bias` is True. With more tokens, ``pallas`` takes
no dense bias (its ``MAX_BLOCK``)."""


def dense_shared_bias(queries: int, keys: int) -> bool:
    """Whether a bias that several layers share becomes a dense array before the first of these layers.

    The result is True for short inputs on a TPU. There, each layer would otherwise compute the dense array and, in the
    backward pass, the gradient of the bias's table. With one array for all layers, the gradients of the array are added
    over the layers, and the gradient of the table is computed once. For T5-small with 512 tokens, this saves 1 % of a
    training step (TPU compiler's estimate).
    """
    return sharding.platform() == "tpu" and max(queries, keys) <= MAX_DENSE_BIAS_TOKENS


def shift_rows_by_reshape() -> bool:
    """Whether the relative shift of scores (Dai et al. 2019, appendix B) is computed by a reshape, not by a slice of
    each row.

    On a CPU, the gradient of the reshape takes 3 times as long as the gradient of the slices.
    """
    return sharding.platform() != "cpu"


MIN_ABSORBED_CONTEXT = 128
"""Minimum batch size times number of keys (B * S) for absorbed attention. With fewer keys, transposing the weights on a
CPU takes longer than projecting the keys."""


def absorbed_attention(q_BTHK: jax.Array, context_BSD: jax.Array, *, dropout: float, key: jax.Array | None) -> bool:
    """Whether attending to the cached inputs directly is cheaper than projecting keys and values.

    Absorbed attention (``jaxlm.nn.attention.memory``) computes scores, the weighted mean and the bias of relative
    positions, with ``B T S H D`` multiplications each. Otherwise, the layer projects keys, values and the embeddings of
    relative positions, with about ``B S D H K`` multiplications each. So absorbed attention needs fewer multiplications
    if T < K. It is chosen if 4 T <= K and if there are enough keys (``MIN_ABSORBED_CONTEXT``).

    Absorbed attention does not support dropout, and it does not record attention weights. So the result is False with
    dropout, and while attention weights are recorded.

    Args:
        q_BTHK: the queries.
        context_BSD: the inputs from which keys and values are projected.
        dropout, key: dropout rate and random key. A key of None means no dropout.
    """
    if is_recording() or (key is not None and dropout > 0.0):
        return False
    (B, T, _, K), S = q_BTHK.shape, context_BSD.shape[1]
    return 4 * T <= K and B * S >= MIN_ABSORBED_CONTEXT


def memory_decoding_layout() -> bool:
    """Whether ``decoding.loop.decoding_loop`` uses the decoding layout of a memory (``jaxlm.nn.attention.memory``).

    By the TPU compiler's estimate for a v5e, a token of Transformer-XL (base) takes 0.87 instead of 1.89 ms with this
    layout, and a token of XLNet-base 0.54 instead of 2.05 ms (8 rows, 512 slots). On an AMD EPYC (Zen 5), generation
    takes 0.93 to 1.20 times as long, so the layout is not used on a CPU.
    """
    return sharding.platform() != "cpu"


def fused_qkv() -> bool:
    """Whether one matmul computes queries, keys and values.

    The result is True on a CPU. Attention kernels of accelerators need separate arrays for queries, keys and values, so
    slices of the output of one matmul would be copies.
    """
    return sharding.platform() == "cpu"


# ---------------------------------------------------------------------------------- recurrence, scans, convolutions


def recurrence(unsupported: str | None, *, remat: bool) -> Literal["chunked", "pallas"]:
    """The implementation of an LSTM or GRU layer.

    It is ``pallas`` on a TPU if ``pallas`` supports the arguments and ``remat`` is False; otherwise ``chunked``.

    Args:
        unsupported: why ``pallas`` does not support the arguments; None if it supports them.
        remat: whether the backward pass recomputes the gates, which only ``chunked`` supports.
    """
    use_pallas = sharding.platform() == "tpu" and unsupported is None and not remat
    return "pallas" if use_pallas else "chunked"


def recurrence_chunk(batch: int, steps: int) -> int:
    """The number of steps of a chunk of an LSTM, GRU or sLSTM layer.

    On a single CPU device, it is the number of steps that fit into ``CpuChoices.recurrence_chunk_rows`` rows, at least
    1. It may exceed ``steps``. The arrays of a chunk should fit into the CPU cache, and allocating large arrays is slow
    (0.4 ms/MB for arrays over 32 MB). In all other cases, one chunk has all steps.
    """
    return max(1, cpu_choices().recurrence_chunk_rows // max(1, batch)) if _is_single_cpu() else steps


def linear_scan(unsupported: str | None) -> Literal["sequential", "chunked", "pallas"]:
    """The implementation of ``linear_scan``.

    On a CPU, it is ``sequential``. On a TPU, it is ``pallas`` if ``pallas`` supports the arguments, otherwise
    ``chunked``. On a GPU, it is ``chunked``, because a GPU runs a loop of many steps slowly.

    Args:
        unsupported: why ``pallas`` does not support the arguments; None if it supports them.
    """
    platform = sharding.platform()
    if platform == "cpu":
        return "sequential"
    return "pallas" if platform == "tpu" and unsupported is None else "chunked"


MIN_CHUNKED_STEPS = 8
"""Minimum number of steps for which the functions that :func:`matrix_scan` lists run in chunks."""
LINEAR_ATTENTION_CHUNK_ACCELERATOR = 128
"""Steps of a chunk of ``linear_attention``, ``ssd`` and ``mlstm`` on an accelerator, whose matrix units need more rows
than the vector instructions of a CPU (``CpuChoices.linear_attention_chunk``)."""


def matrix_scan(steps: int, unsupported: str | None) -> Literal["reference", "chunked", "pallas"]:
    """The implementation of ``linear_attention``, ``ssd``, ``mlstm`` and the delta rules.

    The result is ``reference`` for fewer than ``MIN_CHUNKED_STEPS`` steps. For more steps, it is ``pallas`` on a TPU if
    ``pallas`` supports the arguments, otherwise ``chunked``. Without a gradient, a CPU may run a loop instead of
    ``chunked`` (:func:`loops_without_gradient`).

    Args:
        steps: T, the number of steps.
        unsupported: why ``pallas`` does not support the arguments; None if it supports them.
    """
    if steps < MIN_CHUNKED_STEPS:
        return "reference"
    return "pallas" if sharding.platform() == "tpu" and unsupported is None else "chunked"


def step_kernel(dtype: DTypeLike) -> bool:
    """Whether the TPU kernel of ``jaxlm.nn.scan.step_pallas`` computes a call with one step.

    With 8 rows, a layer's step takes 23 k instead of 41 k cycles in Mamba-2 130M (24 heads, state of 128 x 64), and 8 k
    instead of 55 k in RWKV-7 0.1B (12 heads, 64 x 64); TPU compiler's estimate for a v5e.

    Args:
        dtype: dtype of the values. The TPU compiler rejects a kernel with float16.
    """
    return _is_new_tpu() and dtype != jnp.float16


def loops_without_gradient(key_width: int, state_size: int, *, per_channel: bool) -> bool:
    """Whether ``linear_attention`` or ``generalized_delta_rule`` runs as a loop over steps if it is not differentiated.

    Args:
        key_width: K, the width of the keys of a head.
        state_size: B * H * K * V, the number of entries of the state.
        per_channel: whether there is one decay per channel of the keys, not one per head.
    """
    if sharding.platform() != "cpu":
        return False
    return per_channel or (key_width >= 64 and state_size <= cpu_choices().max_loop_state)


def kernel_chunk(steps: int) -> int:
    """The number of steps of a chunk of the TPU kernels of ``linear_attention`` and ``gated_delta_rule``."""
    return min(LINEAR_ATTENTION_CHUNK_ACCELERATOR, steps + -steps % 16)


def linear_attention_chunk() -> int:
    """The number of steps of a chunk of ``linear_attention``, ``ssd`` and ``mlstm`` outside the TPU kernels."""
    is_cpu = sharding.platform() == "cpu"
    return cpu_choices().linear_attention_chunk if is_cpu else LINEAR_ATTENTION_CHUNK_ACCELERATOR


GATED_DELTA_RULE_CHUNK_ACCELERATOR = 64
"""Steps of a chunk of ``gated_delta_rule`` on an accelerator: the chunk size of the paper (Yang, Kautz and Hatamizadeh
2024). Large chunks are more expensive than in ``linear_attention``, because each chunk solves a triangular system."""


def gated_delta_rule_chunk() -> int:
    """The number of steps of a chunk of ``gated_delta_rule`` outside the TPU kernels."""
    is_cpu = sharding.platform() == "cpu"
    return cpu_choices().gated_delta_rule_chunk if is_cpu else GATED_DELTA_RULE_CHUNK_ACCELERATOR


GENERALIZED_DELTA_RULE_CHUNK_ACCELERATOR = 16
"""Steps of a chunk of ``generalized_delta_rule`` on an accelerator, if the log decays have no known bound."""
GENERALIZED_DELTA_RULE_CHUNK_BOUNDED = 64
"""Steps of a chunk of ``generalized_delta_rule`` on an accelerator, if the log decays have a known bound.

Cycles of the forward and backward pass (B 8, T 1,024, H 32, K 64, bfloat16, bound -0.61; TPU compiler's estimate for a
v5e): 69 M with chunks of 64 steps, 110 M with 16.
"""


def generalized_delta_rule_chunk(is_bounded: Callable[[int], bool]) -> int:
    """The number of steps of a chunk of ``generalized_delta_rule``.

    Args:
        is_bounded: a function of the number of steps of a chunk. It returns whether the log decays have a bound
            (``min_log_decay``) that is small enough for such a chunk.
    """
    if sharding.platform() == "cpu":
        return cpu_choices().generalized_delta_rule_chunk
    if is_bounded(GENERALIZED_DELTA_RULE_CHUNK_BOUNDED):
        return GENERALIZED_DELTA_RULE_CHUNK_BOUNDED
    return GENERALIZED_DELTA_RULE_CHUNK_ACCELERATOR


def whole_triangular_systems() -> bool:
    """Whether the inverse of a triangular matrix is computed with matrices of the full size, not with diagonal blocks.

    The result is False on a CPU, where products of small blocks need fewer operations. A TPU pads arrays of small
    blocks to many times their size.
    """
    return sharding.platform() != "cpu"


def head_sums_by_matmul() -> bool:
    """Whether matmuls with ones compute the sums over the channels of each head (``jaxlm.nn.head_norm``).

    The result is True on a TPU. There, XLA would copy the array to separate the axis of heads.
    """
    return sharding.platform() == "tpu"


def depthwise_convolution(segment_ids: jax.Array | None) -> Literal["reference", "shifts"]:
    """The implementation of ``depthwise_convolution``.

    It is ``shifts`` on a CPU, or if there are segment ids, which only ``shifts`` supports; otherwise ``reference``.
    """
    return "shifts" if sharding.platform() == "cpu" or segment_ids is not None else "reference"


def join_tail() -> bool:
    """Whether a depthwise convolution joins the tail and the new inputs into one array.

    The result is False on an accelerator, because XLA writes this array to memory. For 8 x 1,024 tokens and 6,144
    channels, this takes 0.76 M of the 23 M cycles of a layer of Gated DeltaNet (TPU compiler's estimate for a v6e).

    On a CPU, the gradients are faster if the inputs are joined: 1.4 instead of 2.2 ms with the forward pass (16 x 128
    tokens, 512 channels, one core of an AMD EPYC, Zen 5).
    """
    return sharding.platform() == "cpu"


def sum_depthwise_gradient_in_blocks(blocks: int) -> bool:
    """Whether the gradient of depthwise weights is summed over blocks of time.

    The result is True on a single CPU device with at least 2 blocks. One sum per tap over the whole input would read
    the input once per tap, which is slow on a CPU.
    """
    return _is_single_cpu() and blocks >= 2


# ------------------------------------------------------------------------------------------------------- experts

ExpertsImplementation = Literal["reference", "ragged_dot", "blocks"]
MIN_BLOCKS_MULTIPLICATIONS = 2**20
"""Minimum number of multiplications (tokens * E * D * F) for ``blocks`` on a CPU. With fewer multiplications,
``reference`` is used, because its program is smaller.

CPU time in ms, forward / forward and backward together (jaxlib 0.10.2, 2 cores of a shared machine). E is the number of
experts, N the number of experts per token, D the model width, and F the hidden width of an expert. A CPU computes
``ragged_dot`` as a matmul of every row with every expert. ``capacity 1.25`` is the implementation with a capacity
factor of 1.25, for comparison:

    tokens  E   N  D    F    reference   ragged_dot  blocks     capacity 1.25
    1       8   2  256  512  1.1/10      2.7/12      0.3/2      0.4/10
    272     4   2  32   48   0.2/1.0     0.3/1.5     0.3/1.0    0.2/0.8
    512     8   2  256  512  30/204      51/232      25/86      15/45
    1024    64  4  256  256  443/2303    not run     48/248     54/207
"""


def experts(tokens: int, gate_shape: tuple[int, ...], *, explicit_mesh: bool) -> ExpertsImplementation:
    """The implementation of a mixture of experts without a capacity.

    Args:
        tokens: number of tokens, padding included.
        gate_shape: [E, D, F]: experts, model width, hidden width.
        explicit_mesh: whether the tokens are on a mesh with Explicit axes, on which only ``reference`` runs.
    """
    if explicit_mesh:
        return "reference"
    if sharding.platform() != "cpu":
        return "ragged_dot"
    return "reference" if tokens * math.prod(gate_shape) < MIN_BLOCKS_MULTIPLICATIONS else "blocks"


def expert_block_rows(assignments: int, num_experts: int) -> int:
    """The number of rows of a block of the experts' matmuls (``blocks``).

    A block has half the mean number of rows of an expert, so that few rows are padding. A block has at most 256 rows,
    so that it fits into the CPU cache. With fewer than 4 assignments per expert, such as in decoding, a block has one
    row. If no token is padding and one device has all experts, no such block is empty. Then only the weights of
    selected experts are read.

    Args:
        assignments: number of pairs of a token and one of its selected experts.
    """
    return max(1, min(256, assignments // (2 * num_experts)))


# ------------------------------------------------------------------------------------------------- linear, losses


def bias_gradient_by_matmul(bias: jax.Array) -> bool:
    """Whether the gradient of a bias is computed as a matmul with rows of ones.

    The result is True on a TPU for a bias with several axes, which belongs to a projection to attention heads. On a
    TPU, an attention kernel computes the gradient of the projection's output. The gradient of the bias is the sum of
    this gradient over rows. XLA cannot fuse the sum into the kernel, so the vector unit would need a separate pass. The
    matrix unit computes the sum faster (GPT-2, by the TPU compiler's estimate: 0.09 instead of 0.35 M cycles).
    """
    return bias.ndim > 1 and sharding.platform() == "tpu"


def merge_head_axes() -> bool:
    """Whether a linear layer merges its last two input axes into one, and its last two output axes into one.

    These are the axes of the heads and of their width.

    On a TPU, XLA computes a product with separate axes of 12 heads and 64 entries as a convolution, which uses half of
    the matrix unit, and pads 64 entries to 128. With merged axes, XLA computes a matmul without padding. For a
    block of GPT-2 with 16 rows of 1,024 tokens, the TPU compiler estimates 2.25 instead of 2.88 M cycles for the
    products, without the kernels.
    """
    return sharding.platform() == "tpu"


def isolate_weight_gradient() -> bool:
    """Whether the gradient of a weight is computed separately from the operations that follow it, such as a transpose.

    XLA merges a transpose into the matmul before it. On a CPU, a matmul is slow if its result has few columns and many
    rows. GFLOP/s of weight gradients with and without this merge, for 4,096 rows (one core of an AMD EPYC (Zen 4),
    jaxlib 0.10.2; the ratios are the same on two cores):

        inputs, outputs     256, 64    512, 128    1024, 256    2048, 512    8192, 64    8192, 128
        merged                 52         53          66           84           30          47
        separate               88         93          99          101          103         103
    """
    return sharding.platform() == "cpu"


WEIGHT_GRADIENT_BLOCK = 2**19
"""The number of entries of ``dy`` in a block. Blocks of wide rows have more, because of the next limit."""
MIN_WEIGHT_GRADIENT_ROWS = 1024
"""Minimum number of rows of a block."""
MIN_WEIGHT_GRADIENT_BLOCKS = 4
"""Minimum number of blocks. With fewer blocks, one matmul computes the gradient of a weight."""


def weight_gradient_block_rows(rows: int, outputs: int) -> int:
    """The number of rows of a block if the gradient ``dy.T @ x`` of a weight is a sum over blocks, otherwise ``rows``.

    If the process has one device, a CPU, and there are many rows, blocks are faster. XLA merges the transpose of ``dy``
    into the operations that compute ``dy``. It then writes ``dy.T`` with a large stride, so it uses the caches badly.
    In a loop, XLA transposes one block at a time. A training step of VDCNN-9 (128 x 1,024 characters) takes 1.17
    instead of 1.40 s with 4 to 64 blocks (jaxlib 0.10.2, two cores of an AMD EPYC, Zen 5). With several devices, the
    rows may be sharded, and XLA would gather them for the loop.

    Args:
        rows: number of rows of ``dy``.
        outputs: number of entries of a row of ``dy``.
    """
    block_rows = max(MIN_WEIGHT_GRADIENT_ROWS, WEIGHT_GRADIENT_BLOCK // max(1, outputs))
    is_faster = sharding.platform() == "cpu" and jax.device_count() == 1
    return block_rows if is_faster and rows >= MIN_WEIGHT_GRADIENT_BLOCKS * block_rows else rows


MAX_FUSED_VECTOR_BYTES = 2**14
"""If a vector has fewer bytes than this number, XLA on a CPU fuses the transpose of a table into the product of the
table and the vector."""


def is_table_first_operand(rows: int, width: int) -> bool:
    """Whether float32 logits are computed as ``(table @ hidden.T).T`` instead of ``hidden @ table.T``.

    The result is True on a single CPU device for few rows (``CpuChoices.max_few_rows``), except for one narrow row
    (``MAX_FUSED_VECTOR_BYTES``). For one wide row, ``hidden @ table.T`` transposes the whole table first: 139 ms
    instead of 9.6 for a table of 16,000 x 4,096, on one core of an AMD EPYC (Zen 4).

    Args:
        rows: number of hidden states.
        width: width of a hidden state.
    """
    is_one_narrow_row = rows == 1 and 4 * width < MAX_FUSED_VECTOR_BYTES
    return _is_single_cpu() and rows <= cpu_choices().max_few_rows and not is_one_narrow_row


def isolate_logits(rows: int) -> bool:
    """Whether the logits are computed separately from the operations that follow, such as adding a bias.

    The result is True for one row on a single CPU device. XLA would merge the bias into the product of the table and
    the row, and would then transpose the whole table first. With a bias, the four products of
    ``CpuChoices.max_few_rows`` would take 46 ms instead of 4.5.
    """
    return _is_single_cpu() and rows == 1


MAX_KERNEL_ROWS = 64
"""Maximum number of rows on a device (batch times time) for the kernels of norms and of logits. With 64
rows, a token of RWKV-7 0.1B takes 2,318 k cycles with the norm kernel and 2,601 k without it, and a token of GPT-2
3,266 k and 3,303 k (TPU compiler's estimate for a v5e). More rows were not planned."""
MIN_UNEMBED_KERNEL_BYTES = 90 * 2**20
"""Minimum number of bytes of a device's part of the table for the kernel that computes logits. XLA copies a smaller
table to VMEM during earlier operations, so its matmul waits less for the table."""
MAX_UNEMBED_KERNEL_WIDTH = 2**13
"""Maximum width of the table for the kernel that computes logits. If the table were wider, its smallest block (LANES
rows) would have more than ``unembed_pallas.MAX_BLOCK_BYTES`` bytes."""


def unembed_kernel(table_VD: jax.Array, hidden_BTD: jax.Array) -> bool:
    """Whether the TPU kernel of ``jaxlm.nn.unembed_pallas`` computes the logits of a large bfloat16 table.

    With 8 rows, the head of RWKV-7 0.1B (65,536 x 768) takes 188 k instead of 275 k cycles, and the head of
    Transformer-XL (267,735 x 410) takes 518 k instead of 689 k (TPU compiler's estimate for a v5e).
    """
    shards = sharding.num_shards(("vocab",))
    return (
        _is_new_tpu()
        and table_VD.dtype == hidden_BTD.dtype == jnp.bfloat16
        and table_VD.size * 2 / shards >= MIN_UNEMBED_KERNEL_BYTES
        and table_VD.shape[0] % shards == 0
        and table_VD.shape[1] <= MAX_UNEMBED_KERNEL_WIDTH
        and _has_few_rows(hidden_BTD)
        and not _may_reject_pallas_call()
    )


def norm_kernel(x: jax.Array, *params: jax.Array) -> bool:
    """Whether the TPU kernel of ``jaxlm.nn.norm_pallas`` computes a norm of ``x`` with these parameters.

    The kernel is used for one token per row. XLA computes such a norm with three operations of about 1.8 k cycles each.
    With the kernel, a token takes 913 k instead of 1,168 k cycles in RWKV-7 0.1B, 884 k instead of 928 k in GPT-2, and
    1,261 k instead of 1,370 k in SmolLM2-135M (8 rows, TPU compiler's estimate for a v5e). The kernel is not used for
    norms of groups: a token of Mamba-2 130M would take 124 k cycles longer, because XLA would no longer fuse the
    operations before the norm with its sums.
    """
    return (
        _is_new_tpu()
        and x.dtype != jnp.float16  # the TPU compiler rejects a kernel with float16
        and x.ndim == 3
        and x.shape[1] == 1
        and all(parameter.ndim == 1 for parameter in params)
        and _has_few_rows(x)
        and not _may_reject_pallas_call()
    )


def rotary_kernel(x_BTHK: jax.Array) -> bool:
    """Whether the TPU kernel of ``jaxlm.nn.attention.rotary_pallas`` rotates queries or keys.

    With the kernel, a training step of a Llama with 1.3B parameters takes 466 instead of 554 ms on 16 chips of a v5e,
    and 186 instead of 221 ms on a v6e (TPU compiler's estimate). The kernel is not used for one token per row. There, a
    decoded token would take 0 to 7 % less time, but the estimate does not contain the start of a kernel.
    """
    B, T, H, K = x_BTHK.shape
    shards = [sharding.num_shards((axis,)) for axis in ("batch", "seq", "heads")]
    return (
        _is_new_tpu()
        and x_BTHK.dtype != jnp.float16  # the TPU compiler rejects a kernel with float16
        and T > 1
        and x_BTHK.size > 0
        and not any(size % count for size, count in zip((B, T, H), shards, strict=True))
        and sharding.num_shards(("kv",)) == 1
        and (K % LANES == 0 or LANES % K == 0)
        and not _may_reject_pallas_call()
    )


def _has_few_rows(x: jax.Array) -> bool:
    """Whether hidden states [B, T, D] have 1 to ``MAX_KERNEL_ROWS`` rows on a device, and devices split only B."""
    shards = sharding.num_shards(("batch",))
    rows = math.prod(x.shape[:2]) // shards
    is_split_otherwise = any(sharding.num_shards((axis,)) > 1 for axis in ("seq", "activation_embed"))
    return 0 < rows <= MAX_KERNEL_ROWS and x.shape[0] % shards == 0 and not is_split_otherwise


def _may_reject_pallas_call() -> bool:
    """Whether ``pallas_call`` may raise an error: on a mesh with Explicit axes, and in ``jax.shard_map``.

    In ``shard_map``, ``pallas_call`` needs ``check_vma=False``.
    """
    return sharding.is_explicit() or bool(jax.sharding.get_abstract_mesh().manual_axes)


MIN_LOSS_KERNEL_POSITIONS = 256
"""Minimum number of positions per device for the kernels of the cross entropy. With fewer positions, the time to read
the table is longer than the time of a matmul."""
MIN_LOSS_KERNEL_VOCAB = 2048
"""Minimum size of the vocabulary for the kernels of the cross entropy. With fewer ids, storing the logits takes little
time."""
TWO_CORE_TPUS = ("TPU v5", "TPU v5p")
"""The device kinds of TPUs with two cores per device. The kernels of the cross entropy use only one of them, because
their grid steps depend on each other. On a v5p, GPT-2 has 44.7 % of the peak with them and 50.5 % without them (TPU
compiler's estimate)."""
MAX_LOSS_KERNEL_WIDTH = 1536
"""Maximum model width for the kernels of the cross entropy. The kernels save reads of the logits, whose time does not
depend on the width, but compute one more matmul. With a width of 2,048 on a v5e, a step of Llama takes 2 % more and a
step of GPT 1 % less time with the kernels (1.3B parameters, TPU compiler's estimate)."""
MAX_LOSS_KERNEL_WIDTH_V6E = 4096
"""The same for a v6e, whose matmuls are faster in comparison with its memory. With a width of 2,048, Llama reached 32.7
instead of 30.9 % of the peak (before the kernel of rotary positions). Larger widths were not planned."""


def loss_kernels(table_VD: jax.Array, hidden_BTD: jax.Array) -> bool:
    """Whether the TPU kernels of ``jaxlm.nn.loss.pallas`` compute the cross entropy of tokens.

    Only the shapes and dtypes of the arguments are used.
    """
    shards = sharding.num_shards(("batch",))
    max_width = MAX_LOSS_KERNEL_WIDTH_V6E if _is_v6e() else MAX_LOSS_KERNEL_WIDTH
    vocab_size, (B, T, width) = table_VD.shape[0], hidden_BTD.shape
    return (
        _is_new_tpu()
        and sharding.device_kind() not in TWO_CORE_TPUS
        and hidden_BTD.dtype == jnp.bfloat16
        and table_VD.dtype in (jnp.bfloat16, jnp.float32)  # the TPU compiler cannot convert float16 to bfloat16
        and vocab_size >= MIN_LOSS_KERNEL_VOCAB
        and width <= max_width
        and B % shards == 0
        and B * T // shards >= MIN_LOSS_KERNEL_POSITIONS
        and not any(sharding.num_shards((axis,)) > 1 for axis in ("seq", "vocab", "activation_embed"))
        and not _may_reject_pallas_call()
    )


def argmax_by_maximum() -> bool:
    """Whether the argmax of logits is computed from the maximum, as the first index with this value.

    Otherwise, ``jnp.argmax`` is used. On one core of an AMD EPYC (Zen 4), jaxlib 0.10.2, ``jnp.argmax`` of 8 x 50,257
    logits takes 1.8 ms, and the computation from the maximum takes 0.24 ms.
    """
    return sharding.platform() == "cpu"


MAX_LOGITS_ACCELERATOR = 2**27
"""Maximum number of logits that exist at the same time on an accelerator: 512 MiB in float32. Each chunk of a loss
reads and writes the gradient of all output weights, so many chunks are slow. For example, with a limit of 2**24 logits,
the 98 chunks of a GPT-2 step took as long as the rest of the step."""


def max_logits() -> int:
    """The maximum number of logits that exist at the same time, on all devices together."""
    per_device = MAX_LOGITS_ACCELERATOR
    if sharding.platform() == "cpu":
        per_device = cpu_choices().max_logits * (2 if host.is_freed_memory_kept() else 1)
    return per_device * sharding.num_shards(("batch", None, "vocab"))


def loss_chunk(steps: int, longest: int) -> int:
    """The number of steps of a chunk of a loss: all steps if ``longest`` allows it, otherwise at most ``longest``.

    All chunks have about the same length. On an accelerator, the length is a multiple of ``LANES`` or a power of two
    less than ``LANES``. By the TPU compiler's estimate, chunks of 147 steps take a sixth more time than chunks
    of 128.
    """
    if longest >= steps:
        return steps
    balanced = -(-steps // -(-steps // longest))
    if sharding.platform() == "cpu":
        return balanced
    multiple = min(LANES, 2 ** (longest.bit_length() - 1))
    return min(balanced + -balanced % multiple, longest - longest % multiple)


TARGET_LOSS_BLOCKS = 16
"""Number of blocks of ``selected_cross_entropy`` if all weights are nonzero and there are many rows (one row for each
position). With few rows, there are fewer blocks (``MIN_LOSS_BLOCK_ROWS``). If the logits of a block would exceed
``max_logits``, there are more blocks. The last block is padded, so small blocks waste less work on padding."""
MIN_LOSS_BLOCK_ROWS = {"cpu": 32}
"""Minimum number of rows per device of a block of ``selected_cross_entropy``, by platform. Platforms without an entry
have ``MIN_LOSS_BLOCK_ROWS_ACCELERATOR`` rows. Matmuls with fewer rows are slow."""
MIN_LOSS_BLOCK_ROWS_ACCELERATOR = LANES


def loss_block_rows(rows: int, vocab_size: int) -> int:
    """The number of rows of a block of ``selected_cross_entropy``, a multiple of the number of shards of the batch."""
    shards = sharding.num_shards(("batch",))
    min_rows = MIN_LOSS_BLOCK_ROWS.get(sharding.platform(), MIN_LOSS_BLOCK_ROWS_ACCELERATOR) * shards
    block_rows = math.ceil(rows / (TARGET_LOSS_BLOCKS * min_rows)) * min_rows
    return max(min(block_rows, max_logits() // vocab_size, rows) // shards, 1) * shards


# --------------------------------------------------------------------------------------------------------- models


def prevent_cse_in_remat(*, unrolled: bool) -> bool:
    """The argument ``prevent_cse`` of ``jax.checkpoint`` for the layers of a model.

    In an unrolled loop over layers, XLA may merge the recomputation with the original computation (common subexpression
    elimination, CSE), so CSE is prevented. In a scan over layers, it need not be prevented. On a CPU, CSE is not
    prevented either, because XLA reorders an unrolled loop there: recomputation would take time and save no memory
    (docs/labbook.md).

    Args:
        unrolled: whether the layers run in an unrolled loop instead of a scan.
    """
    return unrolled and sharding.platform() != "cpu"

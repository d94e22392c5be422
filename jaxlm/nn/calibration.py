"""Measurements of the values of :class:`jaxlm.nn.cpu_choices.CpuChoices` on this machine, for ``jaxlm calibrate``.

Each value has a few candidates and a few programs whose speed depends on it. A program is traced with each candidate
and compiled; candidates that give the same program share one compilation. Then the compiled programs run in turn, so
that changes in the load of the machine affect all of them. The inputs are the same in every run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn import cpu_choices
from jaxlm.nn.attention import attention
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.cpu_choices import CpuChoices
from jaxlm.nn.embedding import unembed
from jaxlm.nn.loss import chunked_cross_entropy
from jaxlm.nn.recurrence import lstm, lstm_specs
from jaxlm.nn.scan import gated_delta_rule, generalized_delta_rule, linear_attention, ssd
from jaxlm.spec import Params

MIN_SPEEDUP = 1.05
"""A candidate replaces the default only if it is more than this number of times as fast."""
SAME_TIME = 1.02
"""Two candidates are about equally fast if the ratio of their times is below this number."""
SECONDS = 5.0
"""After this time, the measurement of a program ends, if ``MIN_ROUNDS`` rounds are complete."""
QUICK_ROUNDS, MIN_ROUNDS, MAX_ROUNDS = 4, 6, 30
MIN_RUN_SECONDS = 0.01
"""A fast program runs several times per round, so that one measured time is at least this long."""


class Program(NamedTuple):
    """A function of arrays to measure.

    Attributes:
        label: the function, its sizes, and "both" for the forward and the backward pass together.
    """

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Measurement(NamedTuple):
    """How a value is measured.

    Attributes:
        candidates: the values that are compared, in ascending order. The default is one of them.
        programs: a function that yields the programs. Each program is made when it is measured, to save memory.
    """

    candidates: tuple[int, ...]
    programs: Callable[[], Iterator[Program]]


@dataclasses.dataclass(frozen=True)
class Result:
    """The times of the candidates of one value.

    Attributes:
        name: the field of ``CpuChoices``.
        default: the value of the field before the measurement.
        candidates: the values that were compared.
        seconds: by the label of the program, the times [rounds, candidates].
    """

    name: str
    default: int
    candidates: tuple[int, ...]
    seconds: dict[str, np.ndarray]

    def relative_times(self) -> np.ndarray:
        """The time of each candidate relative to the time of the default, [candidates].

        In each round, the times are divided by that of the default. The result is the median over the rounds, then the
        geometric mean over the programs. For each candidate, the mean leaves out the programs that are the same with
        the candidate and with the default.
        """
        return np.exp(_mean_over_changed_programs(self._log_ratios(0.0, 1.0)))

    @property
    def chosen(self) -> int:
        """The fastest of the candidates that are faster than the default by ``MIN_SPEEDUP`` in the first half of the
        rounds and also in the second half (as in :meth:`relative_times`). Without such a candidate, the default.

        The fastest candidate has the smallest geometric mean over all programs. Of several candidates that are about
        equally fast (``SAME_TIME``), it is the one nearest to the default.
        """
        halves = self._log_ratios(0.0, 0.5), self._log_ratios(0.5, 1.0)
        is_faster = np.maximum(*map(_mean_over_changed_programs, halves)) < -math.log(MIN_SPEEDUP)
        means = np.mean(self._log_ratios(0.0, 1.0), axis=0)
        default = self.candidates.index(self.default)
        limit = min(means[is_faster], default=0.0) + math.log(SAME_TIME)
        fastest = [index for index in range(len(means)) if is_faster[index] and means[index] < limit]
        return self.candidates[min(fastest, key=lambda index: abs(index - default), default=default)]

    def _log_ratios(self, begin: float, end: float) -> np.ndarray:
        """The logarithm of each candidate's time divided by the default's time, [programs, candidates].

        It is the median over the rounds.

        Args:
            begin, end: the rounds that are used, as fractions of all rounds.
        """
        default = self.candidates.index(self.default)
        selected = [times[int(begin * len(times)) : int(end * len(times))] for times in self.seconds.values()]
        return np.array([np.median(np.log(times / times[:, default, None]), axis=0) for times in selected])


def _mean_over_changed_programs(log_ratios: np.ndarray) -> np.ndarray:
    """For each candidate, the mean over the programs whose logarithm is not 0, [candidates].

    The logarithm is exactly 0 if a program is the same with the candidate and with the default.
    """
    return log_ratios.sum(axis=0) / np.maximum(1, np.count_nonzero(log_ratios, axis=0))


def measure(name: str, values: CpuChoices, *, quick: bool = False) -> Result:
    """Measure the candidates of one value.

    Args:
        name: a key of :data:`MEASUREMENTS`.
        values: the values of all fields. The value of ``name`` is the default with which the candidates are compared.
        quick: whether to measure only the first program, in few rounds.
    """
    candidates, make_programs = MEASUREMENTS[name]
    rounds, max_seconds = (QUICK_ROUNDS, 0.0) if quick else (MIN_ROUNDS, SECONDS)
    seconds = {}
    with cpu_choices.use(values):
        for program in itertools.islice(make_programs(), 1 if quick else None):
            lowered = lower(program, [dataclasses.replace(values, **{name: candidate}) for candidate in candidates])
            unique = dict(lowered)  # by text, because candidates may give equal programs
            compiled = [unique_program.compile() for unique_program in unique.values()]
            times = measure_in_turn(compiled, program.arguments, rounds, max_seconds)
            seconds[program.label] = times[:, [list(unique).index(text) for text, _ in lowered]]
    return Result(name, getattr(values, name), candidates, seconds)


def lower(program: Program, settings: Sequence[CpuChoices]) -> list[tuple[str, Any]]:
    """The program traced with each of ``settings``: its text, and the object to compile."""
    results = []
    for values in settings:
        with cpu_choices.use(values):
            # Each call of ``jax.jit`` needs a new function. Otherwise, the function would be traced only once.
            lowered = jax.jit(lambda *arguments: program.function(*arguments)).lower(*program.arguments)
        results.append((lowered.as_text(), lowered))
    return results


def measure_in_turn(
    compiled: Sequence[Callable[..., Any]], arguments: tuple[Any, ...], rounds: int, max_seconds: float
) -> np.ndarray:
    """Seconds per call, [rounds, programs]. In every second round, the programs run in the opposite order.

    Args:
        rounds: minimum number of rounds. There are more, at most ``MAX_ROUNDS``, until ``max_seconds`` have passed.
    """

    def run(function: Callable[..., Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(function(*arguments))
        return (time.perf_counter() - start) / calls

    for function in compiled:
        run(function, 1)  # the first call allocates memory
    calls = math.ceil(MIN_RUN_SECONDS / min(run(function, 1) for function in compiled))
    rows: list[list[float]] = []
    end = time.perf_counter() + max_seconds
    while len(rows) < rounds or (len(rows) < MAX_ROUNDS and time.perf_counter() < end):
        order = range(len(compiled)) if len(rows) % 2 == 0 else reversed(range(len(compiled)))
        times = {index: run(compiled[index], calls) for index in order}
        rows.append([times[index] for index in range(len(compiled))])
    return np.array(rows)


# ------------------------------------------------------------------------------------------------------- programs


def _normal(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _both(label: str, function: Callable[..., Any], *arguments: Any, constants: Any = ()) -> Program:
    """The forward and backward pass of ``function(*constants, *arguments)``, with the gradients of ``arguments``."""
    outputs = jax.eval_shape(function, *constants, *arguments)
    cotangents = jax.tree.map(lambda x: _normal(x.shape)[0], outputs)

    def run(cotangents: Any, constants: Any, *arguments: Any) -> Any:
        outputs, vjp = jax.vjp(lambda *arguments: function(*constants, *arguments), *arguments)
        return outputs, vjp(cotangents)

    return Program(f"{label}, both", run, (cotangents, constants, *arguments))


def _attention() -> Iterator[Program]:
    causal = lambda q, k, v: attention(q, k, v, Mask(causal=True))  # noqa: E731
    for queries in (128, 64, 256):
        rows, label = 4096 // queries, f"attention B{4096 // queries} T{queries} H8 K64"
        arguments = _normal(*[(rows, queries, 8, 64)] * 3)
        yield _both(label, causal, *arguments)
        yield Program(f"{label}, forward", causal, tuple(arguments))


def _attention_in_documents() -> Iterator[Program]:
    def in_documents(segment_ids: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, Mask(causal=True, query_segments=segment_ids, key_segments=segment_ids))

    for queries in (512, 256, 1024):
        rows = 1024 // queries
        segment_ids = jnp.broadcast_to(1 + jnp.arange(queries) // (queries // 3), (rows, queries))
        label = f"attention with documents B{rows} T{queries} H12 K64"
        arguments = _normal(*[(rows, queries, 12, 64)] * 3)
        yield _both(label, in_documents, *arguments, constants=(segment_ids,))


def _recurrence() -> Iterator[Program]:
    for steps, rows, width in ((128, 32, 256), (128, 16, 512)):
        specs = lstm_specs(width, width)
        arrays = _normal((rows, steps, width), *(spec.shape for spec in specs.values()))
        params = {name: 0.05 * x for name, x in zip(specs, arrays[1:], strict=True)}
        layer = lambda params, x: lstm(params, x)[0]  # noqa: E731
        yield _both(f"lstm T{steps} B{rows} H{width}", layer, params, arrays[0])


def _linear_attention() -> Iterator[Program]:
    B, T, H, K = 2, 1024, 8, 64
    *qkv, gate = _normal(*[(B, T, H, K)] * 4)
    log_decay = -0.1 * jax.nn.sigmoid(gate)
    rule = lambda *arguments: linear_attention(*arguments)[0]  # noqa: E731
    yield _both("linear_attention B2 T1024 H8 K64", rule, *qkv, log_decay[..., 0])
    yield _both("linear_attention B2 T1024 H8 K64, decays per channel", rule, *qkv, log_decay)
    x, b, c, step = _normal((1, 512, 24, 64), *[(1, 512, 1, 128)] * 2, (1, 512, 24))
    scan = lambda *arguments: ssd(*arguments)[0]  # noqa: E731
    yield _both("ssd B1 T512 H24 K128 V64", scan, x, 0.1 * jax.nn.sigmoid(step), -jnp.ones(24), b, c)


def _linear_attention_forward() -> Iterator[Program]:
    rule = lambda *arguments: linear_attention(*arguments)[0]  # noqa: E731
    for B, T, H, K in ((4, 256, 8, 64), (1, 1024, 8, 64), (4, 512, 8, 128)):
        *qkv, gate = _normal(*[(B, T, H, K)] * 3, (B, T, H))
        arguments = *qkv, -0.1 * jax.nn.sigmoid(gate)
        yield Program(f"linear_attention B{B} T{T} H{H} K{K}, forward", rule, arguments)


def _gated_delta_rule() -> Iterator[Program]:
    rule = lambda *arguments: gated_delta_rule(*arguments)[0]  # noqa: E731
    for B, T, H, K in ((2, 512, 8, 64), (1, 512, 4, 128)):
        q, k, v, gate, beta = _normal(*[(B, T, H, K)] * 3, *[(B, T, H)] * 2)
        arguments = q, _unit(k), v, -0.1 * jax.nn.sigmoid(gate), jax.nn.sigmoid(beta)
        yield _both(f"gated_delta_rule B{B} T{T} H{H} K{K}", rule, *arguments)


def _generalized_delta_rule() -> Iterator[Program]:
    bound = -math.exp(-0.5)  # the lowest log decay of RWKV-7
    q, k, v, gate, removal, rate = _normal(*[(1, 512, 8, 64)] * 6)
    arguments = q, k, v, bound * jax.nn.sigmoid(gate), _unit(removal), jax.nn.sigmoid(rate)
    for min_log_decay in (bound, None):

        def rule(q: Any, k: Any, v: Any, log_decay: Any, removal: Any, rate: Any, limit: Any = min_log_decay) -> Any:
            low_rank = -removal, rate * removal
            return generalized_delta_rule(q, k, v, log_decay, low_rank, min_log_decay=limit)[0]

        label = "generalized_delta_rule B1 T512 H8 K64"
        yield _both(label if min_log_decay is None else f"{label}, bounded decays", rule, *arguments)


def _decode() -> Iterator[Program]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, query_order: jax.Array, key_order: jax.Array) -> jax.Array:
        return attention(q, k, v, Mask(causal=True, query_order=query_order, key_order=key_order))

    for B, S, H, K in ((8, 576, 12, 64), (2, 576, 12, 64), (8, 1024, 16, 128)):
        arrays = _normal((B, 1, H, K), *[(B, S, H, K)] * 2)
        orders = jnp.full((1, 1), S - 1), jnp.arange(S)[None]
        yield Program(f"decode B{B} S{S} H{H} K{K}, forward", attend, (*arrays, *orders))


def _logits_of_few_rows() -> Iterator[Program]:
    for rows in (16, 4, 64):
        hidden, table = _normal((1, rows, 768), (32000, 768))
        project = lambda table, hidden: unembed(table, hidden, table.shape[0])  # noqa: E731
        yield Program(f"logits of {rows} rows, D768 V32000, forward", project, (table, hidden))


def _loss() -> Iterator[Program]:
    B, T, D, V = 8, 160, 256, 32000
    hidden, table = _normal((B, T, D), (V, D))
    targets = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
    head = lambda params, hidden: unembed(params["table"], hidden, V)  # noqa: E731

    def loss(targets: jax.Array, params: Params, hidden: jax.Array) -> jax.Array:
        return chunked_cross_entropy(head, params, hidden, targets, jnp.ones(targets.shape))

    yield _both(f"loss B{B} T{T} D{D} V{V}", loss, {"table": 0.05 * table}, hidden, constants=(targets,))


MEASUREMENTS = {
    "min_blockwise_queries": Measurement((64, 128, 256, 512), _attention),
    "max_shared_mask_queries": Measurement((1, 256, 512, 1024), _attention_in_documents),
    "recurrence_chunk_rows": Measurement((256, 512, 1024, 2048), _recurrence),
    "linear_attention_chunk": Measurement((16, 32, 64, 128), _linear_attention),
    "gated_delta_rule_chunk": Measurement((16, 32, 64), _gated_delta_rule),
    "generalized_delta_rule_chunk": Measurement((8, 16, 32, 64), _generalized_delta_rule),
    "max_loop_state": Measurement((2**14, 2**16, 2**18, 2**20), _linear_attention_forward),
    "decode_partial_sums": Measurement((4, 8, 16, 32), _decode),
    "max_few_rows": Measurement((2, 8, 32, 128), _logits_of_few_rows),
    "max_logits": Measurement((2**22, 2**23, 2**24, 2**25), _loss),
}
"""The measurement of each field of ``CpuChoices``, in the order in which they run. ``max_loop_state`` follows
``linear_attention_chunk``, because it compares a loop with chunks of this size."""

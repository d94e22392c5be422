"""The loop that decodes token by token, and the layout of the model state in this loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxlm import spec
from jaxlm.models import Model
from jaxlm.nn.attention import memory
from jaxlm.spec import State

MAX_ADDED_TOKENS = 128
"""Maximum number of tokens that a memory in the decoding layout reads before it is converted. More tokens need more
space, and the conversion takes about as long as a few tokens."""

Progress = TypeVar("Progress")


def loop_state_specs(model: Model, specs: spec.Tree, max_steps: int) -> Any:
    """The specs of the model state inside :func:`decoding_loop`.

    Args:
        specs: the specs of the state outside the loop.
    """
    if not _has_decoding_layout(model):
        return specs
    return memory.decoding_specs(specs, _num_added_slots(specs["segment_ids"].shape[1], max_steps))


def decoding_loop(
    model: Model,
    specs: spec.Tree,
    unfinished: Callable[[Progress], jax.Array],
    read_next: Callable[[Progress, spec.Tree], Progress],
    progress: Progress,
    *,
    max_steps: int,
) -> Progress:
    """The result of ``while unfinished(progress): progress = read_next(progress, specs)``.

    Transformer-XL and XLNet have a memory with a decoding layout (``jaxlm.nn.attention.memory``). The state has this
    layout inside the loop, so that a step does not copy the memory. ``read_next`` gets the specs of the state in the
    loop.

    Args:
        specs: specs with the axes of the state outside the loop. The sizes of the axes may differ.
        progress: a dataclass with the model state in the field ``state``.
        max_steps: maximum number of steps.
    """
    if not _has_decoding_layout(model):
        return jax.lax.while_loop(unfinished, lambda progress: read_next(progress, specs), progress)
    state: State = progress.state  # type: ignore[attr-defined]
    num_added = _num_added_slots(state["segment_ids"].shape[1], max_steps)
    loop_specs = memory.decoding_specs(specs, num_added)

    def read_tokens(progress: Any) -> Any:
        state = memory.to_decoding_layout(specs, progress.state, num_added)
        progress, _ = jax.lax.while_loop(
            lambda carry: (carry[1] < num_added) & unfinished(carry[0]),
            lambda carry: (read_next(carry[0], loop_specs), carry[1] + 1),
            (dataclasses.replace(progress, state=state), 0),
        )
        return dataclasses.replace(progress, state=memory.from_decoding_layout(specs, progress.state, num_added))

    return jax.lax.while_loop(unfinished, read_tokens, progress)


def _has_decoding_layout(model: Model) -> bool:
    # An object with the methods of a model need not have a module.
    return hasattr(getattr(model, "module", None), "to_decoding_layout")


def _num_added_slots(slots: int, max_steps: int) -> int:
    """The number of slots that the decoding layout adds to a memory of ``slots`` slots.

    The sum is a multiple of 16, because a TPU stores bfloat16 arrays in tiles of 16 rows.
    """
    steps = min(max_steps, MAX_ADDED_TOKENS)
    return steps + -(slots + steps) % 16

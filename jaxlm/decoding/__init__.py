"""Decoding: sampling, beam search, scoring and text, written once for every family that carries a state.

Only ``apply``, ``logits`` and ``state_specs`` of a model are used, never what its state holds.
"""

from jaxlm.decoding.beam import Beams, beam_search
from jaxlm.decoding.sample import GREEDY, Generation, Progress, Sampling, advance, filter_logits, generate, prefill
from jaxlm.decoding.score import Perplexity, log_likelihood, perplexity
from jaxlm.decoding.text import generate_text, stream_text

__all__ = [
    "GREEDY",
    "Beams",
    "Generation",
    "Perplexity",
    "Progress",
    "Sampling",
    "advance",
    "beam_search",
    "filter_logits",
    "generate",
    "generate_text",
    "log_likelihood",
    "perplexity",
    "prefill",
    "stream_text",
]

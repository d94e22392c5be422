"""Decoding: sampling, beam search, scoring and text generation, for every family with a model state.

A model state is what a model keeps of the tokens that it has read: a key-value cache, a recurrent state or a memory.
Decoding calls the methods ``apply``, ``logits``, ``state_specs``, ``init_state``, ``init_decode_state`` and
``rollback`` of a model. The specs of a state name its axes. Decoding reorders the rows of a state along the axis
``batch``, and resizes a cache along the axis ``slots``.
"""

from jaxlm.decoding.beam import BeamConfig, Beams, beam_search
from jaxlm.decoding.config import GenerationConfig
from jaxlm.decoding.finite import NotFiniteError
from jaxlm.decoding.sample import (
    GREEDY,
    Generation,
    PartialGeneration,
    Sampling,
    advance,
    filter_logits,
    generate,
    prefill,
)
from jaxlm.decoding.score import Perplexity, log_likelihood, perplexity, target_log_likelihood
from jaxlm.decoding.speculative import SpeculativeGeneration, SpeculativeModels, speculative_generate
from jaxlm.decoding.text import decoder_start_id, generate_text, stream_text

__all__ = [
    "GREEDY",
    "BeamConfig",
    "Beams",
    "Generation",
    "GenerationConfig",
    "NotFiniteError",
    "PartialGeneration",
    "Perplexity",
    "Sampling",
    "SpeculativeGeneration",
    "SpeculativeModels",
    "advance",
    "beam_search",
    "decoder_start_id",
    "filter_logits",
    "generate",
    "generate_text",
    "log_likelihood",
    "perplexity",
    "prefill",
    "speculative_generate",
    "stream_text",
    "target_log_likelihood",
]

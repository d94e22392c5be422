"""Texts, games, tokenizers, token files and batches. This package computes with numpy on the host, without JAX."""

from jaxlm.data.batching import Batches, ContiguousStreams, PackedDocuments, RandomWindows, Source, TokenBatch
from jaxlm.data.corpora import shakespeare
from jaxlm.data.encodings import Encoding
from jaxlm.data.games import Games, chess_games, read_games, split_games
from jaxlm.data.moves import MoveTokenizer
from jaxlm.data.random_access import RandomAccess
from jaxlm.data.text_files import read_text
from jaxlm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    PretrainedTokenizer,
    SpecialIds,
    Tokenizer,
    load_tokenizer,
)
from jaxlm.data.tokens import check_tokens, open_tokens, split_documents, split_tokens, write_tokens
from jaxlm.data.vocabularies import train_tokenizer

__all__ = [
    "Batches",
    "ByteTokenizer",
    "CharTokenizer",
    "ContiguousStreams",
    "Encoding",
    "Games",
    "MoveTokenizer",
    "PackedDocuments",
    "PretrainedTokenizer",
    "RandomAccess",
    "RandomWindows",
    "Source",
    "SpecialIds",
    "TokenBatch",
    "Tokenizer",
    "check_tokens",
    "chess_games",
    "load_tokenizer",
    "open_tokens",
    "read_games",
    "read_text",
    "shakespeare",
    "split_documents",
    "split_games",
    "split_tokens",
    "train_tokenizer",
    "write_tokens",
]

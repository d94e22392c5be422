"""Training of tokenizers: subwords (BPE, unigram), words and characters. Training needs the package ``tokenizers``.

    tokenizer = train_tokenizer(texts, "bpe", 10_000, template="eos")
    tokenizer.save("directory")             # load_tokenizer and transformers' AutoTokenizer can read it

Subwords are sequences of bytes, and the vocabulary contains all 256 bytes. So a subword tokenizer can encode every
text. ``decode`` returns exactly this text, unless the text contains a special token or ``lowercase`` is set. A subword
tokenizer adds a space before each text. So the first word of a text has the same ids as the same word after a space.
``decode`` removes the added space.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, get_args

from jaxlm import extras
from jaxlm.config import check_min
from jaxlm.data.text_files import check_no_surrogate
from jaxlm.data.tokenizers import NO_TOKEN_TYPES, PretrainedTokenizer, check_strings

Kind = Literal["bpe", "unigram", "word", "character"]
TemplateName = Literal["none", "eos", "bos_eos", "cls_sep", "sep_cls"]
_SUBWORDS = ("bpe", "unigram")


@dataclasses.dataclass(frozen=True)
class _Template:
    """The special tokens of a template, and their positions in the encoding of a text or of a pair of texts.

    Attributes:
        tokens: role (``"pad"``, ``"eos"``, ...) -> token, in the order of the ids.
        single, pair: the template for one text and for a pair, in the syntax of ``TemplateProcessing`` in the package
            ``tokenizers``: ``$A`` and ``$B`` are the texts, and ``:1`` sets the token type 1.
        config: further entries of ``tokenizer_config.json``.
    """

    tokens: Mapping[str, str]
    single: str
    pair: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# The special tokens have the order of the published vocabularies of T5, RoBERTa, BERT and XLNet. RoBERTa needs pad
# id 1, because it numbers positions from the pad id plus 1.
_TEMPLATES: dict[str, _Template] = {
    "none": _Template({"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "$A", "$A $B:1", NO_TOKEN_TYPES),
    "eos": _Template({"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "$A </s>", "$A </s> $B </s>", NO_TOKEN_TYPES),
    "bos_eos": _Template(
        {
            "bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>",
        },
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
        NO_TOKEN_TYPES,
    ),
    "cls_sep": _Template(
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "sep_cls": _Template(
        {
            "unk": "<unk>", "bos": "<s>", "eos": "</s>", "cls": "<cls>", "sep": "<sep>", "pad": "<pad>",
            "mask": "<mask>",
        },
        "$A <sep> <cls>:2",
        "$A <sep> $B:1 <sep>:1 <cls>:2",
        {"padding_side": "left"},
    ),
}  # fmt: skip


def train_tokenizer(
    texts: Iterable[str],
    kind: Kind,
    vocab_size: int,
    *,
    template: TemplateName = "none",
    lowercase: bool = False,
    min_frequency: int = 1,
    extra_tokens: Sequence[str] = (),
) -> PretrainedTokenizer:
    """A tokenizer whose vocabulary is learned from ``texts``.

    The same texts in the same order give the same vocabulary. Special tokens have the first ids. For translation, pass
    the texts of both languages.

    Args:
        texts: the training texts. The function iterates over them once.
        kind: ``"bpe"`` (Sennrich et al. 2016) and ``"unigram"`` (Kudo 2018) make subwords of bytes. For them,
            ``decode(encode(x)) == x`` if ``x`` contains no special token and ``lowercase`` is False. ``"word"`` splits
            at white space, and ``decode`` puts one space between words. ``"character"`` has one id per character, and
            ``decode`` adds no spaces. A word or character outside the vocabulary is encoded as the unknown token.
        vocab_size: maximum number of ids, including special tokens. Short training texts give fewer ids.
        template: the special tokens that ``encode_inputs`` adds to a text or a pair of texts. The columns are the
            template, the encoding of a pair ``a``, ``b``, the models that use the template, and the ids:

            ===========  ==========================  ================  ================================================
            ``none``     ``a b``                     language models   pad 0, eos 1, unk 2
            ``eos``      ``a </s> b </s>``           encoder-decoders  pad 0, eos 1, unk 2 (as in T5)
            ``bos_eos``  ``<s> a </s> </s> b </s>``  RoBERTa           bos 0, pad 1, eos 2, unk 3, mask 4
            ``cls_sep``  ``[CLS] a [SEP] b [SEP]``   BERT              pad 0, unk 1, cls 2, sep 3, mask 4
            ``sep_cls``  ``a <sep> b <sep> <cls>``   XLNet             unk 0, bos 1, eos 2, cls 3, sep 4, pad 5, mask 6
            ===========  ==========================  ================  ================================================

        lowercase: convert texts to lower case, in training and in ``encode``.
        min_frequency: the vocabulary contains only the words, characters or BPE merges that occur at least this often
            in ``texts``; at least 1. For ``"unigram"``, it must be 1.
        extra_tokens: further special tokens, such as T5's ``<extra_id_0>``. Their ids follow the ids of the
            template tokens.

    Raises:
        ImportError: the package ``tokenizers`` is not installed.
        TypeError: ``texts`` or ``extra_tokens`` is a single string, or has an element that is not a string.
        ValueError: there are no texts; a text has a surrogate; the kind is ``"unigram"``, and all texts consist of
            white space and special tokens; the kind or template is unknown; ``min_frequency`` is invalid;
            ``extra_tokens`` contains an empty string; or ``vocab_size`` is too small for the special tokens and one
            more id (for subwords: 256 more ids).

    Example:
        >>> tokenizer = train_tokenizer(["to be or not to be"], "word", 100, template="eos")
        >>> tokenizer.encode_inputs("to be here").ids.tolist()
        [4, 3, 2, 1]
        >>> tokenizer.decode([4, 3, 2, 1], skip_special_tokens=True)
        'to be'
    """
    specials = _check_arguments(texts, kind, vocab_size, template, min_frequency, extra_tokens)
    tokenizers = extras.import_optional(
        "tokenizers", "tokenizers", "training a tokenizer needs the package `tokenizers`"
    )
    backend, trainer = _backend_and_trainer(tokenizers, kind, lowercase, vocab_size, specials, min_frequency)
    backend.train_from_iterator(_training_texts(texts, specials, kind), trainer)
    if kind == "unigram":
        backend.model = _make_reproducible(tokenizers, backend, len(specials))
    template_spec = _TEMPLATES[template]
    template_processor = tokenizers.processors.TemplateProcessing(
        single=template_spec.single,
        pair=template_spec.pair,
        special_tokens=[(t, backend.token_to_id(t)) for t in specials],
    )
    # trim_offsets: the offsets of a subword exclude its leading space. So they cover only the word, both for the first
    # word of a text, whose space is added, and for a word after a space of the text.
    byte_level = tokenizers.processors.ByteLevel(add_prefix_space=True, trim_offsets=True)
    backend.post_processor = (
        tokenizers.processors.Sequence([byte_level, template_processor]) if kind in _SUBWORDS else template_processor
    )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in template_spec.tokens.items()},
        **template_spec.config,
    }
    if extra_tokens:
        config["additional_special_tokens"] = list(extra_tokens)
    files = {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    return PretrainedTokenizer(backend, template_spec.tokens, files=files)


def _check_arguments(
    texts: Iterable[str], kind: str, vocab_size: int, template: str, min_frequency: int, extra_tokens: Sequence[str]
) -> list[str]:
    """Check the arguments. Returns the special tokens in the order of their ids."""
    for name, value, choices in (("kind", kind, get_args(Kind)), ("template", template, tuple(_TEMPLATES))):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}")
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings, got one string: pass [text] or text.splitlines()")
    check_strings("extra_tokens", extra_tokens)
    if "" in extra_tokens:
        raise ValueError(f"extra_tokens={list(extra_tokens)} has an empty string: remove it")
    check_min(1, min_frequency=min_frequency)
    if min_frequency > 1 and kind == "unigram":
        raise ValueError(f"min_frequency={min_frequency} has no effect for kind='unigram': do not set it")
    specials = list(dict.fromkeys([*_TEMPLATES[template].tokens.values(), *extra_tokens]))
    min_entries = 256 if kind in _SUBWORDS else 1
    if vocab_size < len(specials) + min_entries:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(specials)} special tokens and at least {min_entries} "
            f"{'bytes' if min_entries == 256 else 'entry'} need {len(specials) + min_entries}"
        )
    return specials


def _training_texts(texts: Iterable[str], specials: Sequence[str], kind: str) -> Iterator[str]:
    """Yield the parts of the texts between special tokens.

    ``encode`` splits texts in the same way. Without this split, the trainer for words would count a special token in a
    text as a word. The id of this word would then replace the id of the special token.

    Raises:
        TypeError: a text is not a string.
        ValueError: there are no texts; a text has a surrogate, which has no UTF-8 bytes; or the kind is ``"unigram"``,
            and all texts consist of white space and special tokens.
    """
    position, is_empty = -1, True
    special_pattern = re.compile("|".join(map(re.escape, specials)))
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {position} must be a string, got {type(text).__name__}: {text!r}")
        check_no_surrogate(text, f"text {position}")
        for part in special_pattern.split(text):
            is_empty = is_empty and not part.strip()
            yield part
    if position < 0:
        raise ValueError("there are no texts to train a tokenizer on: pass at least one")
    if is_empty and kind == "unigram":
        raise ValueError(
            "all texts have only white space and special tokens: a unigram model needs at least one other character"
        )


def _backend_and_trainer(
    tokenizers: ModuleType, kind: str, lowercase: bool, vocab_size: int, specials: list[str], min_frequency: int
) -> tuple[Any, Any]:
    """The untrained ``tokenizers.Tokenizer``, and its trainer."""
    models, trainers, decoders, pre = (
        getattr(tokenizers, name) for name in ("models", "trainers", "decoders", "pre_tokenizers")
    )
    unknown = next(token for token in specials if token in ("<unk>", "[UNK]"))
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": specials, "show_progress": False}
    normalizers = [tokenizers.normalizers.Lowercase()] if lowercase else []
    if kind in _SUBWORDS:
        options["initial_alphabet"] = pre.ByteLevel.alphabet()
        normalizers.append(tokenizers.normalizers.Prepend(" "))
    if kind == "bpe":
        model, trainer = models.BPE(), trainers.BpeTrainer(min_frequency=min_frequency, **options)
    elif kind == "unigram":
        model, trainer = models.Unigram(), trainers.UnigramTrainer(unk_token=unknown, **options)
    else:
        model = models.WordLevel({unknown: 0}, unk_token=unknown)
        trainer = trainers.WordLevelTrainer(min_frequency=min_frequency, **options)
    backend = tokenizers.Tokenizer(model)
    if normalizers:
        backend.normalizer = normalizers[0] if len(normalizers) == 1 else tokenizers.normalizers.Sequence(normalizers)
    if kind in _SUBWORDS:
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    elif kind == "word":
        backend.pre_tokenizer = pre.WhitespaceSplit()
    else:
        # [\s\S] also matches line breaks; the pattern "." does not.
        backend.pre_tokenizer = pre.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    return backend, trainer


def _make_reproducible(tokenizers: ModuleType, backend: Any, num_specials: int) -> Any:
    """The trained unigram model, with scores and an order that are equal in every training on the same texts.

    The trainer of ``tokenizers`` iterates over a hash table, whose order varies. It sums scores in this order, so the
    last digits of the scores vary. Bytes that do not occur in the texts get the lowest score plus 0, 0.0001, 0.0002,
    ...; which byte gets which score depends on the order, too. This function rounds all scores, gives all bytes that do
    not occur the lowest score, and sorts the pieces by score and text.
    """
    content = json.loads(backend.to_str())["model"]
    pieces = content["vocab"][num_specials:]
    lowest = min(score for _, score in pieces)
    pieces_by_increment: dict[float, list[str]] = {}
    for piece, score in pieces:
        if len(piece) == 1:
            pieces_by_increment.setdefault(round((score - lowest) / 1e-4, 3), []).append(piece)
    unseen: set[str] = set()
    increment = 0.0
    while increment in pieces_by_increment:
        unseen.update(pieces_by_increment[increment])
        increment += 1
    scores = [(piece, round(lowest if piece in unseen else score, 6)) for piece, score in pieces]
    scores.sort(key=lambda entry: (-entry[1], entry[0]))
    specials = [(piece, score) for piece, score in content["vocab"][:num_specials]]
    return tokenizers.models.Unigram(specials + scores, content["unk_id"], False)

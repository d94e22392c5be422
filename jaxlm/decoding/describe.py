"""What a model is and does, in words, for messages to users."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlm.models import Model

_FAMILIES = {
    "gpt": "GPT", "llama": "Llama", "bert": "BERT", "roberta": "RoBERTa", "t5": "T5", "xlnet": "XLNet",
    "transformer_xl": "Transformer-XL", "lstm": "LSTM", "gru": "GRU", "attention_rnn": "attention RNN",
    "attention_rnn_lm": "attention RNN", "resnet": "ResNet", "resnet_lm": "gated convolution", "alexnet": "AlexNet",
}  # fmt: skip
_HEADS = {
    "causal": "a next-token head",
    "masked": "a masked-token head",
    "permutation": "a permutation language-model head",
    "seq2seq": "a sequence-to-sequence head",
    "classification": "a classification head",
    "tagging": "a head that labels tokens",
    "span_qa": "a head for answer spans",
    "none": "no head",
}


def task_of(model: Model) -> str:
    """The task of a model's head."""
    return getattr(model.config, "task", "causal")


def describe(model: Model) -> str:
    """Family and head in words.

    Example:
        >>> from jaxlm import get_model
        >>> describe(get_model("bert-tiny"))
        'a BERT with a masked-token head'
    """
    name = _FAMILIES.get(getattr(model, "family", ""), getattr(model, "family", "model"))
    task = task_of(model)
    article = "an" if name[0] in "aeiouAEIOU" or name[:2] in ("LS", "XL") else "a"
    return f"{article} {name} with {_HEADS.get(task, f'task={task!r}')}"


def require_task(model: Model, tasks: Sequence[str], refused: str, remedy: str) -> None:
    """Raise ``ValueError`` unless the model's head is for one of ``tasks``.

    Args:
        refused: what the model does not do, as "it classifies nothing".
        remedy: what the user can load or call instead.
    """
    if task_of(model) not in tasks:
        raise ValueError(f"this is {describe(model)}: {refused}; {remedy}")

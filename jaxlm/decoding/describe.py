"""Names of the families and heads of models, for error messages."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlm.models import Model

_FAMILIES = {
    "gpt": "GPT", "llama": "Llama", "bert": "BERT", "roberta": "RoBERTa", "t5": "T5", "xlnet": "XLNet",
    "transformer_xl": "Transformer-XL", "lstm": "LSTM", "gru": "GRU", "attention_rnn": "attention RNN",
    "attention_rnn_lm": "attention RNN", "resnet": "ResNet", "resnet_lm": "gated convolution", "alexnet": "AlexNet",
    "mamba2": "Mamba-2",
    "griffin": "Griffin",
    "gated_deltanet": "Gated DeltaNet",
    "xlstm": "xLSTM",
    "rwkv7": "RWKV-7",
}  # fmt: skip
_HEADS = {
    "causal": "a next-token head",
    "masked": "a masked-token head",
    "permutation": "a permutation language-model head",
    "seq2seq": "a sequence-to-sequence head",
    "classification": "a classification head",
    "token_classification": "a head that labels tokens",
    "span_qa": "a head for answer spans",
    "none": "no head",
}


def describe(model: Model) -> str:
    """The family and the head of a model in words.

    Example:
        >>> from jaxlm import get_model
        >>> describe(get_model("bert-tiny"))
        'a BERT with a masked-token head'
    """
    name = _FAMILIES.get(getattr(model, "family", ""), getattr(model, "family", "model"))
    task = model.task
    article = "an" if name[0] in "aeiouAEIOU" or name[:2] in ("LS", "XL", "xL", "RW") else "a"
    return f"{article} {name} with {_HEADS.get(task, f'task={task!r}')}"


def require_task(model: Model, tasks: Sequence[str], problem: str, remedy: str) -> None:
    """Raise ``ValueError`` if ``model.task`` is not one of ``tasks``.

    Args:
        problem: a clause about the missing ability, for example "it cannot classify texts".
        remedy: a clause that tells the user which model to load or which function to call instead.
    """
    if model.task not in tasks:
        raise ValueError(f"this is {describe(model)}: {problem}; {remedy}")


def require_next_token_head(model: Model, problem: str) -> None:
    """Raise ``ValueError`` if the head of the model does not predict the next token.

    Args:
        problem: as in :func:`require_task`.
    """
    remedy = "load a language model (GPT, Llama, LSTM, ...) or an encoder-decoder (T5, attention RNN)"
    require_task(model, ("causal", "permutation", "seq2seq"), problem, remedy)

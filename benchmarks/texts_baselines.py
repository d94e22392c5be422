"""Implementations for ``benchmarks.texts``: jaxlm and transformers translate or classify the texts of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.baselines import JaxImplementation, TorchImplementation, jax_exact, torch_device
from benchmarks.worker import Implementation


class _Texts(Implementation):
    """Base class with the texts of a file, one per line without empty lines, and the batch size."""

    def __init__(self, file: str, batch: int) -> None:
        self.texts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        self.batch = batch

    def sorted_batches(self) -> list[list[int]]:
        """The indices of the texts of each batch. The texts are sorted by their number of characters."""
        order = sorted(range(len(self.texts)), key=lambda index: len(self.texts[index]))
        return [order[first : first + self.batch] for first in range(0, len(order), self.batch)]


class _Jaxlm(_Texts, JaxImplementation):
    def __init__(self, directory: str, file: str, batch: int) -> None:
        super().__init__(file, batch)
        jax = jax_exact()
        import jaxlm
        from jaxlm.data import load_tokenizer

        self.model, params = jaxlm.load_pretrained(directory)
        self.params, self.tokenizer = jax.device_put(params), load_tokenizer(directory)


class JaxlmTranslator(_Jaxlm):
    """Translation with ``jaxlm.decoding.generate_text``."""

    def __init__(self, directory: str, file: str, batch: int, num_beams: int, max_new_tokens: int) -> None:
        super().__init__(directory, file, batch)
        from jaxlm.decoding import GenerationConfig

        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            length_penalty=1.0,
            early_stopping=False,
            batch_size=batch,
        )

    def run(self) -> list[str]:
        from jaxlm.decoding import generate_text

        return generate_text(self.model, self.params, self.tokenizer, self.texts, self.config)


class JaxlmClassifier(_Jaxlm):
    """Label ids from ``jaxlm.tasks.predict.classify``."""

    def run(self) -> list[int]:
        from jaxlm.tasks.predict import classify

        return classify(self.model, self.params, self.tokenizer, self.texts, batch_size=self.batch).ids.tolist()


class _Torch(_Texts, TorchImplementation):
    def __init__(self, directory: str, file: str, batch: int, auto_class: str) -> None:
        super().__init__(file, batch)
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.model = getattr(transformers, auto_class).from_pretrained(directory).eval().to(torch_device())

    def encode(self, indices: list[int]) -> Any:
        """The texts with these indices as a padded batch of token ids on the device."""
        texts = [self.texts[index] for index in indices]
        return self.tokenizer(texts, padding=True, return_tensors="pt").to(torch_device())


def _beam_options(num_beams: int, max_new_tokens: int) -> dict[str, Any]:
    """The keyword arguments of ``generate`` in transformers that correspond to those of :class:`JaxlmTranslator`."""
    return {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "length_penalty": 1.0,
        "early_stopping": False,
        "do_sample": False,
    }


class TorchTranslator(_Torch):
    """Translation with ``generate`` of transformers, one batch after the other."""

    def __init__(self, directory: str, file: str, batch: int, num_beams: int, max_new_tokens: int) -> None:
        super().__init__(directory, file, batch, "AutoModelForSeq2SeqLM")
        self.options = _beam_options(num_beams, max_new_tokens)

    def run(self) -> list[str]:
        import torch

        outputs = [""] * len(self.texts)
        with torch.inference_mode():
            for indices in self.sorted_batches():
                tokens = self.model.generate(**self.encode(indices), **self.options)
                texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
                for index, text in zip(indices, texts, strict=True):
                    outputs[index] = text
        return outputs


class TorchClassifier(_Torch):
    """Label ids from forward passes of transformers, one batch after the other."""

    def __init__(self, directory: str, file: str, batch: int) -> None:
        super().__init__(directory, file, batch, "AutoModelForSequenceClassification")

    def run(self) -> list[int]:
        import torch

        labels = [0] * len(self.texts)
        with torch.inference_mode():
            for indices in self.sorted_batches():
                batch_labels = self.model(**self.encode(indices)).logits.argmax(-1).tolist()
                for index, label in zip(indices, batch_labels, strict=True):
                    labels[index] = label
        return labels


class _Pipeline(_Texts, TorchImplementation):
    """Base class of the implementations that call ``transformers.pipeline`` for the texts in the order of the file."""

    def __init__(self, task: str, directory: str, file: str, batch: int) -> None:
        super().__init__(file, batch)
        import transformers

        self.pipeline: Any = transformers.pipeline(task, directory, device=torch_device())  # type: ignore[call-overload]


class PipelineTranslator(_Pipeline):
    """Translation with ``transformers.pipeline``."""

    def __init__(self, directory: str, file: str, batch: int, num_beams: int, max_new_tokens: int) -> None:
        super().__init__("text2text-generation", directory, file, batch)
        self.options = _beam_options(num_beams, max_new_tokens)

    def run(self) -> list[str]:
        outputs = self.pipeline(self.texts, batch_size=self.batch, **self.options)
        return [output["generated_text"] for output in outputs]


class PipelineClassifier(_Pipeline):
    """Label ids from ``transformers.pipeline``."""

    def __init__(self, directory: str, file: str, batch: int) -> None:
        super().__init__("text-classification", directory, file, batch)

    def run(self) -> list[int]:
        ids = self.pipeline.model.config.label2id
        return [ids[output["label"]] for output in self.pipeline(self.texts, batch_size=self.batch)]

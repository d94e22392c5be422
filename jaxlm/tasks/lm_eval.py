"""The class with which EleutherAI's lm-evaluation-harness (Gao et al. 2021) evaluates jaxlm models.

Importing this module registers the model type ``jaxlm`` with the harness. The module needs the packages of
the extra ``eval``.
Source of the harness: https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm import extras
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.models import Model
from jaxlm.spec import Params
from jaxlm.tasks.loading import load
from jaxlm.tasks.text_requests import TextRequests

try:
    # This import registers the model types of the harness. The harness skips it if a model type is already registered.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ImportError(f"evaluation on tasks needs lm_eval: {extras.install_command('eval')}") from error


@register_model("jaxlm")
class HarnessModel(LM):
    """The harness's ``LM`` interface for a model of any generative family.

    Args:
        model, params, tokenizer, options: the arguments of :class:`jaxlm.tasks.text_requests.TextRequests`. For the
            truncation of long texts, see the methods of ``TextRequests``.

    Raises:
        ValueError: as in ``TextRequests``. The method :meth:`apply_chat_template` always raises it.

    Example:
        >>> lm = HarnessModel(model, params, tokenizer, batch_size=16)   # doctest: +SKIP
        >>> results = lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"])   # doctest: +SKIP
    """

    def __init__(self, model: Model, params: Params, tokenizer: Tokenizer, **options: Any) -> None:
        super().__init__()
        self.requests = TextRequests(model, params, tokenizer, **options)

    @classmethod
    def from_pretrained(cls, pretrained: str | Path, *, dtype: str | None = None, **options: Any) -> HarnessModel:
        """The ``HarnessModel`` of a run directory, or of a directory in Hugging Face layout.

        Args:
            pretrained, dtype: the arguments ``directory`` and ``dtype`` of :func:`jaxlm.tasks.loading.load`.
            options: the keyword arguments of ``TextRequests``.
        """
        return cls(*load(pretrained, dtype), **options)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """The ``HarnessModel`` for ``model_args``, a dictionary with the arguments of :meth:`from_pretrained`.

        Args:
            additional_config: ``batch_size``, ``max_batch_size`` and ``device`` of the harness. ``batch_size`` is a
                number, a number as text, or None (not set). A ``batch_size`` in ``arg_dict`` overrides it. ``device``
                is not used, because JAX selects the device. ``max_batch_size`` is not used, because the batch size does
                not change during a run.

        Raises:
            ValueError: ``pretrained`` is missing, or an argument is unknown or invalid.
        """
        unused = ("device", "max_batch_size")
        additional = {
            name: int(value) if isinstance(value, str) and value.isdecimal() else value  # a command line gives text
            for name, value in (additional_config or {}).items()
            if value is not None and name not in unused
        }
        arguments = {**additional, **arg_dict}
        known = {"pretrained", "dtype", "batch_size", "max_length", "prefix_token_id", "max_gen_toks", "seed"}
        if "pretrained" not in arguments or not arguments.keys() <= known:
            raise ValueError(
                f"the model jaxlm needs pretrained=DIR and takes {', '.join(sorted(known - {'pretrained'}))}; got "
                f"{', '.join(sorted(arguments)) or 'nothing'}"
            )
        return cls.from_pretrained(**arguments)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> HarnessModel:
        """The ``HarnessModel`` for ``model_args``, a text such as ``pretrained=DIR,dtype=bfloat16``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding generates it."""
        return self.requests.log_likelihoods([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-likelihood of each text, from its first to its last token."""
        return self.requests.rolling_log_likelihoods([request.args[0] for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The generated text for each context."""
        return self.requests.generate([request.args for request in requests])

    @property
    def tokenizer_name(self) -> str:
        """The class name of the tokenizer, which the harness uses in the keys of its request cache."""
        return type(self.requests.tokenizer).__name__

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raise ``ValueError``, because jaxlm does not support chat templates."""
        raise ValueError("jaxlm does not support chat templates: evaluate with apply_chat_template=False")

    def get_model_info(self) -> dict[str, Any]:
        """The model's family, size and maximum length, and the counts in ``TextRequests.truncated``.

        The harness adds this dictionary to ``results["config"]``.
        """
        model = self.requests.model
        return {
            "model_family": model.family,
            "model_num_parameters": model.num_parameters,
            "max_length": self.requests.max_length,
            "truncated_requests": dict(self.requests.truncated),
        }

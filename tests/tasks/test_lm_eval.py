"""Tasks of lm-evaluation-harness. The answers must equal those of the harness model ``hf`` on the same files."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from jaxlm import cli
from jaxlm.data import ByteTokenizer
from jaxlm.testing.helpers import add_noise, initial_params, tiny_model
from tests.pages import run_page

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]  # warnings of the harness and its libraries

LINES = ["the man is here.", "a red cup is on the table.", "two dogs are running to the sea.", "snow fell in May."]
QUESTIONS = [
    {"question": "a red cup is on", "choices": [" the table", " the sea", " May"], "answer": 0, "text": LINES[1]},
    {"question": "two dogs ", "choices": ["are here", "fell"], "answer": 0, "text": " ".join(LINES * 6)},
    {"question": " ".join(LINES * 5), "choices": [" snow", " the man is here"], "answer": 1, "text": "snow"},
]
"""The last question and the second text are longer than 64 tokens, the context length of the causal models."""
TASKS = ["tiny_choice", "tiny_rolling", "tiny_generation"]
YAML = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["u", "\\n\\n"], max_gen_toks: 8, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def task_directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write YAML files of the three tasks. Disable downloads and the environment report of the harness."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    for name, text in YAML.items():
        source = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
        header = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(header + text.lstrip(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            patch.setenv(variable, "1")
        import lm_eval.evaluator

        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield folder


def tokenizer_of(family: str) -> Any:
    """Return a byte-level BPE tokenizer with the special tokens and the template of the family."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    specials = {"gpt2": ["<|endoftext|>"], "llama": ["<s>", "</s>"], "t5": ["<pad>", "</s>"]}[family]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    )
    if family != "gpt2":
        single = "<s> $A" if family == "llama" else "$A </s>"
        used = [(token, backend.token_to_id(token)) for token in specials if token in single]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    roles = {
        "gpt2": {"eos_token": "<|endoftext|>"},
        "llama": {"bos_token": "<s>", "eos_token": "</s>"},
        "t5": {"pad_token": "<pad>", "eos_token": "</s>"},
    }[family]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.fixture(scope="module", params=["gpt2", "llama", "t5"])
def transformers_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that transformers saved, with random weights."""
    import torch
    import transformers

    tokenizer = tokenizer_of(request.param)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4, **ids)
        model: Any = transformers.GPT2LMHeadModel(config)
    elif request.param == "llama":
        config = transformers.LlamaConfig(
            max_position_embeddings=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4, **ids,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
            initializer_factor=2.0, **ids,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluate(model: Any, task_directory: Path, **options: Any) -> dict[str, Any]:
    """Return the harness results of the three tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_directory), include_defaults=False)
    return simple_evaluate(model=model, tasks=TASKS, task_manager=manager, bootstrap_iters=0, **options)


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """Return a list of the model's answers for each document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [np.ravel(np.array(sample["resps"], dtype=object)).tolist() for sample in samples]


def test_answers_equal_those_of_the_harness_with_transformers(
    transformers_directory: Path, task_directory: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    from jaxlm.tasks.lm_eval import HarnessModel

    expected = evaluate(HFLM(pretrained=str(transformers_directory), device="cpu", batch_size=3), task_directory)
    model = HarnessModel.from_pretrained(transformers_directory, batch_size=3)
    actual = evaluate(model, task_directory)
    for task in TASKS:
        for jaxlm_answers, hf_answers in zip(answers(actual, task), answers(expected, task), strict=True):
            assert len(jaxlm_answers) == len(hf_answers) >= 1
            for jaxlm_answer, hf_answer in zip(jaxlm_answers, hf_answers, strict=True):
                if isinstance(hf_answer, float):
                    assert jaxlm_answer == pytest.approx(hf_answer, rel=1e-4, abs=2e-3)
                elif model.requests.model.reads_source and isinstance(jaxlm_answer, str):
                    # `hf` adds the number of source tokens to the limit of generated tokens: its text is longer.
                    assert jaxlm_answer
                    assert hf_answer.startswith(jaxlm_answer)
                else:
                    assert jaxlm_answer == hf_answer
        for name, hf_answer in expected["results"][task].items():
            if isinstance(hf_answer, float):
                assert actual["results"][task][name] == pytest.approx(hf_answer, rel=1e-3)
    assert len({text for document in answers(actual, "tiny_generation") for text in document}) > 1
    reads_source = model.requests.model.reads_source
    assert actual["config"]["truncated_requests"] == (
        {"log_likelihoods": 0, "rolling_log_likelihoods": 0, "generate": 0}
        if reads_source
        else {"log_likelihoods": 2, "rolling_log_likelihoods": 1, "generate": 1}
    )


def test_the_example_of_the_page_runs(task_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    model = tiny_model("gpt2-tiny", vocab_size=264)
    jaxlm.save_pretrained("DIR", model, initial_params(model), ByteTokenizer())
    options = {
        "task_manager": TaskManager(include_path=str(task_directory), include_defaults=False),
        "bootstrap_iters": 0,
    }
    monkeypatch.setattr(lm_eval, "simple_evaluate", functools.partial(lm_eval.simple_evaluate, **options))
    page = run_page("docs/evaluation.md", replacements={"lambada_openai": "tiny_choice"})
    assert 0 <= page["results"]["results"]["tiny_choice"]["acc,none"] <= 1


@pytest.fixture(scope="module", params=["lstm-tiny", "attention-rnn-tiny"])
def jaxlm_directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model of a family that transformers does not have."""
    start = {"decoder_start_id": 7} if request.param == "attention-rnn-tiny" else {}
    model = tiny_model(request.param, vocab_size=264, **start)
    folder = tmp_path_factory.mktemp(request.param)
    jaxlm.save_pretrained(folder, model, add_noise(initial_params(model)), ByteTokenizer())
    return folder


def test_the_registered_model_and_the_command_return_the_same_results(
    jaxlm_directory: Path, task_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import jaxlm.tasks.lm_eval  # noqa: F401 (registers the model)

    results = evaluate("jaxlm", task_directory, model_args=f"pretrained={jaxlm_directory},max_length=40", batch_size=2)
    assert len(answers(results, "tiny_choice")[0]) == 2 * 3
    assert results["config"]["model_family"] in ("lstm", "attention_rnn")

    output = tmp_path / "results.json"
    status = cli.main([
        "evaluate", str(jaxlm_directory), "--tasks", *TASKS, "--include-path", str(task_directory),
        "--max-length", "40", "--output", str(output),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0
    assert all(task in printed for task in TASKS)
    assert "requests were truncated: the model reads at most 40 tokens" in printed
    content = json.loads(output.read_text(encoding="utf-8"))
    for task in TASKS:
        for name, value in results["results"][task].items():
            if isinstance(value, float):
                assert content["results"][task][name] == pytest.approx(value, rel=1e-5)


def test_invalid_commands_print_an_error_message(
    jaxlm_directory: Path, task_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--tasks", "tiny_choise", "--include-path", str(task_directory)], "unknown tasks tiny_choise"),
        (["--tasks", "tiny_choice", "--include-path", "missing"], "--include-path missing is not a directory"),
        (["--tasks", "tiny_choice", "--output", "missing/x.json"], "--output missing/x.json: there is no directory"),
        (["--tasks", "tiny_choice", "--limit", "0"], "--limit 0 must be at least 1"),
    ):
        assert cli.main(["evaluate", str(jaxlm_directory), *arguments]) != 0
        assert message in capsys.readouterr().err


def test_the_arguments_of_the_harness_command_are_accepted(jaxlm_directory: Path) -> None:
    from jaxlm.tasks.lm_eval import HarnessModel

    harness = {"batch_size": "16", "max_batch_size": None, "device": "cuda:0"}
    model = HarnessModel.create_from_arg_obj({"pretrained": str(jaxlm_directory)}, harness)
    assert model.requests.batch_size == 16
    model = HarnessModel.create_from_arg_string(f"pretrained={jaxlm_directory},batch_size=2", harness)
    assert model.requests.batch_size == 2


def test_the_model_types_of_the_harness_stay_registered() -> None:
    """The harness registers its own types only if no type is registered."""
    script = (
        "import jaxlm.tasks.lm_eval; from lm_eval.api.registry import get_model; get_model('hf'); get_model('jaxlm')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_invalid_model_arguments_raise_errors(jaxlm_directory: Path) -> None:
    from jaxlm.tasks.lm_eval import HarnessModel

    with pytest.raises(ValueError, match="the model jaxlm needs pretrained=DIR and takes batch_size.*got device, pret"):
        HarnessModel.create_from_arg_string(f"pretrained={jaxlm_directory},device=cuda")
    with pytest.raises(ValueError, match="batch_size='auto' must be an integer of at least 1"):
        HarnessModel.create_from_arg_string(f"pretrained={jaxlm_directory}", {"batch_size": "auto"})
    with pytest.raises(ValueError, match="jaxlm does not support chat templates"):
        HarnessModel.from_pretrained(jaxlm_directory).apply_chat_template([])

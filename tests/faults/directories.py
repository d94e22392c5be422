"""Valid and invalid directories and files for the commands of ``mistakes.txt``. Each is created on demand."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxlm
from experiments import text_generation
from jaxlm import config as config_lib
from jaxlm.data import ByteTokenizer, CharTokenizer, MoveTokenizer
from jaxlm.testing.helpers import initial_params, tiny_model

TEXT = "To be, or not to be: that is the question.\n" * 60
DEEP = "[" * 100_000 + "]" * 100_000
"""JSON for which Python's parser raises RecursionError."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt2-tiny", {}),
    "t5": ("t5-tiny", {}),
    "bert": ("bert-tiny", {}),
    "labels": ("bert-tiny", {"task": "classification", "num_labels": 3}),
    "qa": ("bert-tiny", {"task": "span_qa"}),
    "smallvocab": ("gpt2-tiny", {"vocab_size": 100}),
}
"""Exported models with a byte tokenizer: name -> (variant, fields)."""

CONFIG: dict[str, Any] = {
    "n_layer_float": {"n_layer": 2.0}, "n_layer_true": {"n_layer": True}, "n_layer_text": {"n_layer": "2"},
    "n_layer_negative": {"n_layer": -1}, "n_layer_0": {"n_layer": 0}, "n_layer_huge": {"n_layer": 10**30},
    "n_embd_inf": {"n_embd": 1e400}, "n_embd_null": {"n_embd": None}, "n_head_0": {"n_head": 0},
    "vocab_0": {"vocab_size": 0}, "vocab_huge": {"vocab_size": 10**12}, "eps_text": {"layer_norm_epsilon": "hot"},
    "eps_nan": {"layer_norm_epsilon": float("nan")}, "pdrop_2": {"resid_pdrop": 2.0}, "pdrop_-1": {"resid_pdrop": -1},
    "type_3": {"model_type": 3}, "type_null": {"model_type": None}, "type_alien": {"model_type": "alien"},
    "architectures_text": {"architectures": "x"}, "architectures_3": {"architectures": [3]},
    "positions_-5": {"n_positions": -5}, "activation_7": {"activation_function": 7},
    "eos_text": {"eos_token_id": "x"}, "eos_float": {"eos_token_id": [1.5]},
}  # fmt: skip
"""Invalid fields of ``config.json``. Commands use them as {cfg_NAME}."""

CONTENTS: dict[str, dict[str, str]] = {
    "config.json": {"brace": "{", "list": "[]", "null": "null", "deep": DEEP, "empty": "{}"},
    "generation_config.json": {
        "brace": "{", "list": "[]", "deep": DEEP, "temp": '{"temperature":"hot"}', "tempnan": '{"temperature":NaN}',
        "beams": '{"num_beams":2.0}', "beamsT": '{"num_beams":true}', "eos": '{"eos_token_id":"x"}',
        "eosbig": '{"eos_token_id":99999}', "topkf": '{"do_sample":true,"top_k":5.5}',
        "topk-": '{"do_sample":true,"top_k":-3}',
        "new": '{"max_new_tokens":"many"}', "newbig": '{"max_new_tokens":1e400}', "rep": '{"repetition_penalty":[1]}',
        "dosample": '{"do_sample":"yes","temperature":0.5}',
    },
    "jaxlm_tokenizer.json": {
        "brace": "{", "list": "[]", "deep": DEEP, "type": '{"type":"alien"}', "notype": "{}",
        "typelist": '{"type":[1]}',
        "chars": '{"type":"character","characters":3}', "charsdup": '{"type":"character","characters":"aa"}',
        "charsempty": '{"type":"character","characters":""}', "moves": '{"type":"moves"}',
        "moves2": '{"type":"moves","notation":"san","moves":[3]}',
        "big": json.dumps({"type": "character", "characters": "".join(map(chr, range(32, 1000)))}),
    },
    "checksums.json": {"brace": "{", "list": "[]", "deep": DEEP, "sha": '{"sha256":3}'},
    "tokenizer.json": {
        "brace": "{", "list": "[]", "empty": "{}", "deep": DEEP, "model": '{"model":{"type":"alien"}}',
    },
    "model.safetensors.index.json": {
        "brace": "{", "list": "[]", "empty": "{}", "map": '{"weight_map":3}', "mapv": '{"weight_map":{"a":3}}',
        "deep": DEEP, "up": '{"weight_map":{"a":"../../x.safetensors"}}',
    },
}  # fmt: skip
"""Files with invalid contents. Commands use them as {PREFIX_NAME}, with a prefix of ``PREFIXES``."""

PREFIXES = {
    "cfg": "config.json", "gen": "generation_config.json", "tok": "jaxlm_tokenizer.json", "sum": "checksums.json",
    "hf": "tokenizer.json", "idx": "model.safetensors.index.json",
}  # fmt: skip
PREFERRED_FILES = {"tokenizer.json": "jaxlm_tokenizer.json", "model.safetensors.index.json": "model.safetensors"}
"""Files that jaxlm would read instead of the key, so they are removed."""

FILES: dict[str, bytes] = {
    "file": b"to be\nor not\n",
    "latin": "n\xe9\n".encode("latin-1"),
    "emptyfile": b"",
    "blankfile": b"\n \n",
    "badgz": b"not gzip",
    "cutgz": gzip.compress(b"hello world\n" * 1000)[:40],
    "text": TEXT.encode(),
    "rows": b'{"question":"who?","context":"he is"}\n',
    "jl_brace": b"{\n",
    "jl_num": b"3\n",
    "jl_keys": b'{"question":"x"}\n',
    "jl_type": b'{"question":3,"context":[]}\n',
    "jl_deep": DEEP.encode(),
    "jl_empty": b"",
    "tsv": b"sentence\tlabel\n" + b"".join(b"a good film number %d\t%d\n" % (i, i % 2) for i in range(120)),
    "games": "".join(
        f"e4 {a} {b} {c}\n" for a in ("e5", "c5", "e6", "c6") for b in ("d4", "Nf3", "f4") for c in ("a6", "h6", "g6")
    ).encode(),
    "sums": "".join(
        json.dumps({"package": f"p{i}", "text": f"w{i} x{7 * i} y{13 * i} z{17 * i}.", "summary": f"w{i}"}) + "\n"
        for i in range(60)
    ).encode(),
}  # fmt: skip
SUFFIXES = {
    "file": ".txt", "badgz": ".gz", "cutgz": ".txt.gz", "rows": ".jsonl", "tsv": ".tsv", "sums": ".jsonl",
    "games": ".txt", **{name: ".jsonl" for name in FILES if name.startswith("jl_")},
}  # fmt: skip

RUNS: dict[str, Any] = {
    "run_brace": "{", "run_list": "[]", "run_deep": DEEP, "run_bytes": b"\xff\xfe",
    "run_type": {"temperature": "hot"}, "run_unknown": {"tempature": 1}, "run_nan": {"temperature": float("nan")},
    "run_typeT": {"training": {"steps": True}}, "run_neg": {"training": {"steps": -1}}, "run_notok": {},
    "run_choice": {"training": {"on_corrupt": "Stop"}}, "run_tokenizer": {"tokenizer": "zzz"},
    "run_mode": {"training": {"best_mode": "up"}}, "run_set": {"model": {"name": "gpt", "set": [3]}},
}  # fmt: skip
"""Run directories of ``experiments.text_generation``: contents of ``config.json``, or invalid fields."""

RESULTS: dict[str, dict[str, str | bytes]] = {
    "results_list": {"results.json": "[]"}, "results_null": {"results.json": "null"},
    "results_family": {"results.json": '{"family": 3}'}, "results_minutes": {"results.json": '{"minutes": "long"}'},
    "results_parameters": {"results.json": '{"parameters": "many"}'}, "results_deep": {"results.json": DEEP},
    "results_bytes": {"results.json": b"\xff"},
    "results_score": {"results.json": '{"scores": [{"name": "accuracy", "value": "high"}]}'},
    "metrics_step": {"metrics.jsonl": '{"step": null}\n{"step": 1}\n'}, "metrics_bytes": {"metrics.jsonl": b"\xff\n"},
    "metrics_loss": {"metrics.jsonl": '{"step": 1, "validation_loss": [1]}\n'},
}  # fmt: skip
"""Finished runs with damaged files: name -> {file: content}."""


class Directories(dict[str, Path]):
    """A dict from names to paths. It creates a directory or file when first used. ``{out}`` is a new path each time."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0

    def __missing__(self, name: str) -> Path:
        if name == "out":
            self.count += 1
            return self.root / f"out{self.count}"
        self[name] = path = self.root / f"{name}{SUFFIXES.get(name, '')}"
        self._make(name, path)
        return path

    def _make(self, name: str, path: Path) -> None:
        prefix, _, kind = name.partition("_")
        if name in MODELS:
            variant, fields = MODELS[name]
            self._model(path, variant, ByteTokenizer(), **{"vocab_size": 264, **fields})
        elif name in FILES:
            path.write_bytes(FILES[name])
        elif name in RUNS:
            self._run(name, path)
        elif name in RESULTS:
            path.mkdir()
            for file, content in RESULTS[name].items():
                (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        elif name in SPECIAL:
            SPECIAL[name](self, path)
        elif name == "cfg_bytes":
            self._changed_model(path, lambda: (path / "config.json").write_bytes(b"\xff\xfe\x00"))
        elif prefix == "cfg" and kind in CONFIG:
            self._config(path, "gpt", **CONFIG[kind])
        elif prefix in PREFIXES:
            file = PREFIXES[prefix]
            self._changed_model(path, lambda: (path / file).write_text(CONTENTS[file][kind]))
            (path / PREFERRED_FILES.get(file, "nothing")).unlink(missing_ok=True)
        else:
            raise KeyError(f"no directory or file is called {name!r}")

    def _model(self, path: Path, variant: str, tokenizer: Any, **fields: Any) -> None:
        model = tiny_model(variant, **fields)
        jaxlm.save_pretrained(path, model, initial_params(model))
        if tokenizer is not None:
            tokenizer.save(path)

    def _changed_model(self, path: Path, change: Callable[[], Any], source: str = "gpt") -> None:
        """Copy a model, remove its checksums so that loading finds the fault itself, and apply ``change``."""
        shutil.copytree(self[source], path)
        (path / "checksums.json").unlink()
        change()

    def _config(self, path: Path, source: str, **fields: Any) -> None:
        def change() -> None:
            file = path / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

        self._changed_model(path, change, source)

    def _run(self, name: str, path: Path) -> None:
        (path / "model").mkdir(parents=True)
        if name != "run_notok":
            CharTokenizer.from_text(TEXT).save(path / "model")
        content = RUNS[name]
        if isinstance(content, dict):
            fields = config_lib.to_json(text_generation.PRESETS["gpt"]) | {"data": str(self["text"])}
            training = {**fields["training"], **content.get("training", {})}
            content = json.dumps({**fields, **content, "training": training})
        (path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())

    def _weights(self, path: Path, change: Callable[[Path], Any]) -> None:
        self._changed_model(path, lambda: change(path / "model.safetensors"))

    def _chess(self, path: Path) -> None:
        moves = MoveTokenizer.from_games(["e4 e5 Nf3 Nc6", "d4 d5 c4 e6"], "san", min_count=1)
        self._model(path, "gpt2-tiny", moves, vocab_size=moves.vocab_size)

    def _pairs(self, path: Path) -> None:
        path.mkdir()
        for part, count in (("train", 60), ("val", 8), ("test_2016_flickr", 8)):
            for language, line in (("en", "the cat {} sits\n"), ("de", "die katze {} sitzt\n")):
                (path / f"{part}.{language}").write_text("".join(line.format(i) for i in range(count)))

    def _vocabulary(self, path: Path, vocabulary: str, merges: str) -> None:
        def change() -> None:
            (path / "jaxlm_tokenizer.json").unlink()
            (path / "vocab.json").write_text(vocabulary)
            (path / "merges.txt").write_text(merges)

        self._changed_model(path, change)


def _as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPECIAL: dict[str, Callable[[Directories, Path], Any]] = {
    "none": lambda dirs, path: None,
    "emptydir": lambda dirs, path: path.mkdir(),
    "dangling": lambda dirs, path: path.symlink_to("gone"),
    "chess": Directories._chess,
    "pairs": Directories._pairs,
    "notok": lambda dirs, path: dirs._model(path, "gpt2-tiny", None, vocab_size=264),
    "smalltok": lambda dirs, path: dirs._changed_model(path, lambda: CharTokenizer.from_text(TEXT).save(path)),
    "cut": lambda dirs, path: dirs._weights(path, lambda file: file.write_bytes(file.read_bytes()[:-100])),
    "head": lambda dirs, path: dirs._weights(path, lambda file: file.write_bytes(b"\xff" * 8 + b"{}")),
    "emptyw": lambda dirs, path: dirs._weights(path, lambda file: file.write_bytes(b"")),
    "now": lambda dirs, path: dirs._weights(path, lambda file: file.unlink()),
    "dirw": lambda dirs, path: dirs._weights(path, _as_directory),
    "cfg_dir": lambda dirs, path: dirs._changed_model(path, lambda: _as_directory(path / "config.json")),
    "tok_dir": lambda dirs, path: dirs._changed_model(path, lambda: _as_directory(path / "jaxlm_tokenizer.json")),
    "vm": lambda dirs, path: dirs._vocabulary(path, '{"a":"x"}', "a b c d\n"),
    "vm2": lambda dirs, path: dirs._vocabulary(path, "[]", ""),
    "lab_names": lambda dirs, path: dirs._config(path, "labels", id2label={"0": "a", "1": "b"}),
    "lab_names2": lambda dirs, path: dirs._config(path, "labels", id2label={"x": "a"}),
    "lab_names3": lambda dirs, path: dirs._config(path, "labels", id2label=3),
}  # fmt: skip

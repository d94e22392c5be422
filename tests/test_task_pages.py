"""Tests of the pages of docs/tasks: their Python blocks run, and their command lines parse."""

import json
import re
from itertools import chain
from pathlib import Path

import chess
import numpy as np
import pytest

import jaxlm
from jaxlm.data import CharTokenizer, MoveTokenizer, read_games
from jaxlm.data.stories import make_stories
from jaxlm.data.vocabularies import train_tokenizer
from jaxlm.testing.helpers import initial_params, tiny_model
from tests.pages import ROOT, TASKS, command_lines, parse, run_page

OTHER_PROGRAMS = {"--no-all-versions"}  # option of apt-cache
SENTENCES = [f"a {color} {thing} is here" for color in ("red", "blue") for thing in ("cup", "book", "hat", "pen")]


def save(directory, model, tokenizer):
    """Save a model with random weights and its tokenizer."""
    jaxlm.save_pretrained(directory, model, initial_params(model), tokenizer)


def write_lines(path, lines):
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def random_games(count, moves=20):
    """Yield python-chess boards with random legal moves."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        board = chess.Board()
        for word in ("e4", "e5"):
            board.push_san(word)
        for _ in range(moves):
            board.push(rng.choice(list(board.legal_moves)))
        yield board


# --------------------------------------------------------- functions that create the files that each page needs


def sentiment():
    tokenizer = train_tokenizer(SENTENCES, "word", 60, template="cls_sep")
    sizes = {"vocab_size": tokenizer.vocab_size}
    save("minilm", tiny_model("bert", **sizes), tokenizer)
    classifier = tiny_model("bert", task="classification", num_labels=2, **sizes).with_labels(("bad", "good"))
    save("DIR/model", classifier, tokenizer)
    write_lines("train.tsv", ["sentence\tlabel", *(f"{text}\t{n % 2}" for n, text in enumerate(SENTENCES * 3))])


def translation():
    tokenizer = train_tokenizer(SENTENCES, "bpe", 300, template="eos")
    save("DIR/model", tiny_model("t5", vocab_size=tokenizer.vocab_size, num_layers=1), tokenizer)
    write_lines("train.en", SENTENCES * 3)
    write_lines("train.de", [text.replace("is here", "ist hier") for text in SENTENCES * 3])


def summarization():
    tokenizer = train_tokenizer(SENTENCES, "bpe", 300, template="eos")
    save("DIR/model", tiny_model("attention-rnn-copy-tiny", vocab_size=tokenizer.vocab_size), tokenizer)


def question_answering():
    stories = make_stories(60, sentences=2)
    tokenizer = train_tokenizer(stories.column("context"), "bpe", 400, template="cls_sep")
    save("minilm", tiny_model("bert", vocab_size=tokenizer.vocab_size), tokenizer)
    save("DIR/model", tiny_model("bert", vocab_size=tokenizer.vocab_size, task="span_qa"), tokenizer)
    articles = [
        {"title": row["group"], "paragraphs": [{"context": row["context"], "qas": [
            {"id": row["id"], "question": row["question"],
             "answers": [{"text": text, "answer_start": start} for text, start in zip(row["answers"], row["starts"])]}
        ]}]}
        for row in stories
    ]  # fmt: skip
    Path("train-v1.1.json").write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")


def chess_games():
    boards = list(random_games(30))
    pgn = [f'[Event "{n}"]\n\n{chess.Board().variation_san(board.move_stack)} *\n' for n, board in enumerate(boards)]
    write_lines("games.pgn", pgn)
    tokenizer = MoveTokenizer.from_games(read_games("games.pgn", "san", workers=1).moves, "san")
    save("DIR/model", tiny_model("llama", vocab_size=tokenizer.vocab_size, max_positions=256), tokenizer)


def text_generation():
    text = "ROMEO:\nBut, soft! what light through yonder window breaks?\n" * 40
    tokenizer = CharTokenizer.from_text(text)
    save("DIR/model", tiny_model("gpt", vocab_size=tokenizer.vocab_size), tokenizer)
    Path("mine.txt").write_text(text, encoding="utf-8")


FILES = {
    "chess": chess_games, "question_answering": question_answering, "sentiment": sentiment,
    "summarization": summarization, "text_generation": text_generation, "translation": translation,
}  # fmt: skip

REPLACEMENTS = {
    "chess": {
        '"num_layers": 4, "num_heads": 4, "embed_dim": 128, "mlp_dim": 352': (
            '"num_layers": 1, "num_heads": 2, "embed_dim": 16, "mlp_dim": 16'
        ),
        "length=256": "length=32", "steps=300": "steps=2", "warmup_steps=30": "warmup_steps=1",
        "games=20": "games=2, max_moves=12", "20_000": "2",
    },
    "question_answering": {
        "steps=3000": "steps=2", "warmup_steps=150": "warmup_steps=1", "num_buckets=8": "num_buckets=1",
    },
    "sentiment": {"steps=1000": "steps=2", "warmup_steps=100": "warmup_steps=1"},
    "summarization": {"max_new_tokens=40": "max_new_tokens=4"},
    "text_generation": {
        "embed_dim=128, hidden_dim=256": "embed_dim=8, hidden_dim=16", "steps=1500": "steps=2",
        "warmup_steps=100": "warmup_steps=1", "max_new_tokens=300": "max_new_tokens=4", "96": "8",
    },
    "translation": {
        '"embed_dim": 256, "hidden_dim": 384, "output_dim": 256': '"embed_dim": 8, "hidden_dim": 16, "output_dim": 8',
        "steps=2000": "steps=2", "warmup_steps=200": "warmup_steps=1", "max_new_tokens=60": "max_new_tokens=4",
    },
}  # fmt: skip
"""Page -> {text in its blocks: replacement}, so that each page runs in seconds."""


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("page", TASKS)
def test_the_python_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    FILES[page]()
    namespace = run_page(f"docs/tasks/{page}.md", min_blocks=1, replacements=REPLACEMENTS[page])
    assert capsys.readouterr().out, "the page prints a prediction"
    if "result" in namespace:
        result = namespace["result"]
        assert result.step == 2
        assert np.isfinite(result.validation_loss)
    assert ("result" in namespace) == (page != "summarization"), "its training is that of translation"


# ------------------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize("page", TASKS)
def test_the_command_lines_of_a_page_parse(page, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    text = (ROOT / f"docs/tasks/{page}.md").read_text(encoding="utf-8")
    commands = list(command_lines(text))
    assert ["python", "-m", f"experiments.{page}"] in commands, "the page begins with the default experiment"
    assert any(words[0] == "jaxlm" for words in commands)
    for words in commands:
        assert parse(words, monkeypatch) == 0, words
    # Check also the options in the text between the commands.
    capsys.readouterr()
    programs = {tuple(words[:2] if words[0] == "jaxlm" else words[:3]) for words in commands}
    for program in programs:
        with pytest.raises(SystemExit, match="0"):
            parse([*program, "--help"], monkeypatch)
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)) | OTHER_PROGRAMS
    named = chain.from_iterable(re.findall(r"--[a-z][\w.-]*", code) for code in re.findall(r"`([^`\n]+)`", text))
    assert set(named) <= known


def test_a_wrong_option_in_a_page_is_detected(monkeypatch, capsys):
    loop = "    for n in 1 2; do python -m experiments.sentiment --presett x --output runs/$n || break; done  # both\n"
    commands = list(command_lines(loop + "python -m experiments.sentiment\n"))
    assert commands == [
        ["python", "-m", "experiments.sentiment", "--presett", "x", "--output", f"runs/{n}"] for n in (1, 2)
    ]
    with pytest.raises(SystemExit, match="2"):
        parse(commands[0], monkeypatch)
    assert "presett" in capsys.readouterr().err


def test_commands_in_fenced_blocks_are_found():
    page = """
```console
$ pip install x && X=1 python -m experiments.sentiment --seed 2    # text
$ jaxlm generate DIR \\
      --seed 3
jaxlm output
```

```python
    jaxlm code = "it's"
```
"""
    assert list(command_lines(page)) == [
        ["python", "-m", "experiments.sentiment", "--seed", "2"], ["jaxlm", "generate", "DIR", "--seed", "3"],
    ]  # fmt: skip


def test_each_page_links_to_its_notebook():
    for page in TASKS:
        links = re.findall(r"\]\((\.\./[^)#]+|[\w]+\.md)", (ROOT / f"docs/tasks/{page}.md").read_text(encoding="utf-8"))
        assert f"../notebooks/{page}.ipynb" in links
        for link in links:
            assert (ROOT / "docs/tasks" / link).exists(), link

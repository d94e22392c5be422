"""The table and the result file of the benchmark of speculative decoding, with fake functions."""

import json
from types import SimpleNamespace

import numpy as np

from benchmarks import speculative


def test_plain_decoding_has_no_fraction_of_accepted_tokens(tmp_path, monkeypatch, capsys):
    generation = SimpleNamespace(tokens=np.ones((1, 9), int), lengths=np.array([9]))
    proposals = SimpleNamespace(generation=generation, rounds=np.array([4]), accepted=np.array([6]))
    functions = {speculative.PLAIN: lambda: generation, "2 proposals": lambda: proposals}
    monkeypatch.setattr(speculative, "_functions", lambda options, proposed: functions)
    path = tmp_path / "rows.json"
    arguments = ["--target", "a", "--draft", "b", "--num-proposed", "2", "--tokens", "9", "--json", str(path)]
    assert speculative.main(arguments) == 0
    lines = {line.split("  ")[0]: line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    assert lines["plain"] == ["n/a", "1.00", "1.00"]
    assert lines["2 proposals"] == ["0.75", "2.00", "1.00"]
    assert [row["accepted"] for row in json.loads(path.read_text())["rows"]] == [None, 0.75]

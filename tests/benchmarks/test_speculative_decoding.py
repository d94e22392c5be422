"""The table and the result file of the benchmark of speculative decoding, with fake functions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import report, speculative


def test_plain_decoding_has_no_fraction_of_accepted_tokens(tmp_path, monkeypatch, capsys):
    generation = SimpleNamespace(tokens=np.ones((1, 9), int), lengths=np.array([9]))
    proposals = SimpleNamespace(generation=generation, rounds=np.array([4]), accepted=np.array([6]))
    functions = {speculative.PLAIN: lambda: generation, "2 proposals": lambda: proposals}
    monkeypatch.setattr(speculative, "_decoders", lambda *arguments: ("2M parameters, B1 9 tokens", functions))
    path = tmp_path / "rows.json"
    arguments = ["--target", "a", "--draft", "b", "--num-proposed", "2", "--tokens", "9", "--json", str(path)]
    assert speculative.main(arguments) == 0
    lines = {line.split("  ")[0]: line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    assert lines["plain"] == ["n/a", "1.00", "1.00"]
    assert lines["2 proposals"] == ["0.75", "2.00", "1.00"]
    rows = json.loads(path.read_text())["rows"]
    assert [row["accepted"] for row in rows] == [None, 0.75]
    ours, generate = report.read(tmp_path)
    assert ours.label == "2 proposals, 75% accepted, 2M parameters, B1 9 tokens"
    assert (ours.implementation, generate.implementation) == ("jaxlm", "generate")
    assert (ours.ratio, generate.ratio, generate.seconds) == (1.0, rows[1]["ratio"], rows[0]["median"])
    page = report.section("cpu", "A processor", [ours, generate], tmp_path)
    assert "No baseline was measured." in page
    assert "#### Speculative decoding: A processor" in page
    assert (tmp_path / "cpu_speculative.svg").exists()


@pytest.mark.thorough
def test_quick_trains_and_measures_tiny_models(tmp_path):
    arguments = ["--quick", "--tokens", "6", "--num-proposed", "2", "--rounds", "1"]
    assert speculative.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    ours, generate = report.read(tmp_path)
    assert ours.shape.endswith("B1 6 tokens")


def test_one_of_the_two_models_is_not_enough(capsys):
    for arguments, message in (
        (["--target", "a"], "give both --target and --draft"),
        (["--quick", "--target", "a", "--draft", "b"], "--quick trains tiny models: leave out --target a"),
    ):
        assert speculative.main(arguments) == 2
        assert message in capsys.readouterr().err

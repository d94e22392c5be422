"""The comparison of causal families, for two families and a few steps."""

import json
import math
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from benchmarks import shootout
from benchmarks.harness import UserError


@pytest.mark.thorough
def test_two_families_are_compared_at_equal_parameters_and_flops(tmp_path):
    output = tmp_path / "run"
    assert shootout.main(["--quick", "--families", "lstm,gpt", "--output", str(output)]) == 0
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [(row["equal"], row["family"]) for row in rows] == [
        (basis, family) for basis in ("parameters", "flops") for family in ("lstm", "gpt")
    ]
    for row in rows:
        assert 0 < row["loss"] < 2 * math.log(128)
        assert row["tokens"] == 512
        assert len(row["losses"]) == 8
        assert all(seconds > 0 for seconds in row["decode_seconds"].values())
    lstm, gpt = (row for row in rows if row["equal"] == "flops")
    assert 0.5 < lstm["flops_per_token"] / gpt["flops_per_token"] < 2.0
    assert lstm["state_bytes"] < gpt["state_bytes"]
    assert (output / "table.md").read_text().count("\n") == 6
    assert (output / "shootout.png").stat().st_size > 10_000


def test_sized_selects_the_nearest_width():
    def build(width):
        return SimpleNamespace(size=4 * width**2)

    def size_for(target):
        names = {"family": "gpt", "unit": "FLOPs", "parameters": 50}
        return shootout.sized(build, lambda model: model.size, target, **names).size

    assert [size_for(target) for target in (4, 20, 28, 400, 4 * 64**2)] == [4, 16, 36, 400, 4 * 64**2]
    models = "the gpt models of this benchmark have 4 to 16,384 FLOPs, and the comparison needs"
    with pytest.raises(UserError, match=f"--parameters 50 is too small: {models} 3"):
        size_for(3)
    with pytest.raises(UserError, match=f"--parameters 50 is too large: {models} 16,385"):
        size_for(4 * 64**2 + 1)


def test_each_family_has_its_own_color(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    rows = [
        {"equal": "flops", "family": family, "tokens": 4, "loss": 1.0, "losses": [1.0, 1.0]}
        for family in shootout._FIELDS_BY_WIDTH
    ]
    shootout.draw(rows, tmp_path / "plot.png")
    lines = figures[0].axes[0].lines
    assert len({line.get_color() for line in lines}) == len(lines) == len(rows)


def test_invalid_options_print_an_error(tmp_path, capsys):
    for arguments, message in (
        (["--families", "bert"], "--families 'bert' is unknown: choose from gpt, llama"),
        (["--equal", "speed"], "--equal 'speed' is unknown: choose from parameters, flops"),
        (["--contexts", "long"], "--contexts 'long' must be whole numbers"),
        (["--tokens", "100"], "--tokens 100 gives 0 batches of 16 x 128: at least 8 are needed"),
        (["--quick", "--output", str(tmp_path)], f"--output {tmp_path} exists: choose another directory"),
        (
            ["--parameters", "100000000", "--families", "gpt", "--output", str(tmp_path / "new")],
            "--parameters 100000000 is too large: the gpt models of this benchmark have 23,664 to 51,059,712 "
            "parameters, and the comparison needs 100,000,000",
        ),
        (
            ["--parameters", "100", "--families", "gpt", "--output", str(tmp_path / "new")],
            "--parameters 100 is too small: the gpt models of this benchmark have 23,664 to",
        ),
    ):
        assert shootout.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

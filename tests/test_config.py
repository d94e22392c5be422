import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from jaxlm import config as config_lib
from jaxlm.command_line import parse_experiment
from jaxlm.models import get_model, gpt
from jaxlm.models.common import ModelConfig
from jaxlm.models.hybrid import Multipliers
from jaxlm.testing.helpers import TINY
from jaxlm.training.loop import TrainingConfig
from jaxlm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Outer:
    """A config that contains another config."""

    model: gpt.Config = gpt.Config()
    """Inner."""
    path: Path | None = None
    """A path."""
    rate: float = 0.5
    """A number."""
    files: tuple[Path, ...] = ()
    """Paths."""
    mode: Literal["min", "max"] = "min"
    """A choice."""
    pairs: tuple[tuple[int, float | None], ...] = ()
    """Pairs."""
    parts: tuple[Multipliers, ...] = ()
    """Configs."""


def test_json_round_trip(tmp_path):
    for config in (
        Outer(),
        Outer(
            gpt.Config(num_layers=3, mlp_dim=7),
            Path("a/b"),
            2.0,
            (Path("a"), Path("b")),
            "max",
            ((1, None),),
            (Multipliers(),),
        ),
    ):
        assert config_lib.from_json(Outer, config_lib.to_json(config)) == config
        config_lib.write(config, tmp_path / "config.json")
        assert config_lib.read(Outer, tmp_path / "config.json") == config


def test_lists_in_a_tuple_are_read_as_tuples():
    @dataclasses.dataclass(frozen=True)
    class Tuples:
        anything: tuple[Any, ...] = ()
        sizes: tuple[int, ...] | tuple[tuple[int, int], ...] = ()

    for config in (Tuples(((1, (2,)), "a"), ((1, 2),)), Tuples(sizes=(1, 2))):
        assert config_lib.from_json(Tuples, config_lib.to_json(config)) == config


def test_errors_name_unknown_and_missing_fields(tmp_path):
    with pytest.raises(ValueError, match=r"config.model has an unknown field 'num_layer': did you mean 'num_layers'"):
        config_lib.from_json(Outer, {"model": {"num_layer": 3}})
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist: is .* the directory of a run"):
        config_lib.read(Outer, tmp_path / "config.json")

    @dataclasses.dataclass(frozen=True)
    class Strict:
        needed: int

    with pytest.raises(ValueError, match="config lacks the field 'needed'"):
        config_lib.from_json(Strict, {})


WRONG = [
    ({"model": {"num_layers": 2.0}}, r"config.model.num_layers=2.0 must be a whole number"),
    ({"model": {"num_layers": True}}, r"config.model.num_layers=True must be a whole number"),
    ({"model": {"num_layers": "2"}}, r"config.model.num_layers='2' must be a whole number"),
    ({"model": {"tie_embeddings": 1}}, r"config.model.tie_embeddings=1 must be true or false"),
    ({"model": 3}, r"config.model=3 must be"),
    ({"path": 3}, r"config.path=3 must be a path or None"),
    ({"rate": "hot"}, r"config.rate='hot' must be a finite number"),
    ({"rate": float("nan")}, r"config.rate=nan must be a finite number"),
    ({"rate": True}, r"config.rate=True must be a finite number"),
    ({"rate": 10**400}, r"config.rate=10+ must be a finite number"),
    ({"rate": None}, r"config.rate=None must be a finite number"),
    ({"mode": "Min"}, r"config.mode='Min' must be 'min' or 'max'"),
    ({"files": [3]}, r"config.files=\(3,\) must be a tuple in which each entry is a path"),
    (
        {"pairs": [[1, "a"]]},
        r"config.pairs=.* each entry is a tuple of \(a whole number, a finite number or None\)",
    ),
    ({"pairs": [[1]]}, r"config.pairs=\(\(1,\),\) must be a tuple"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_values_of_the_wrong_type_raise(values, message):
    with pytest.raises(ValueError, match=message):
        config_lib.from_json(Outer, values)


def test_a_choice_of_an_optional_field_is_checked():
    @dataclasses.dataclass(frozen=True)
    class Choices:
        mode: Literal["min", "max"] | None = None
        anything: tuple[Any, ...] = ()

    config_lib.check_choices(Choices())
    config_lib.check_value(tuple[Any, ...], (1, "a"), "anything")
    with pytest.raises(ValueError, match="mode='up' is unknown: choose from 'min', 'max'"):
        config_lib.check_choices(Choices("up"))


def test_the_entries_of_a_list_are_checked():
    for ids in (None, [], [1, 2]):
        config_lib.check_value(list[int] | None, ids, "ids")
    for ids in ([1, True], (1, 2), 1):
        with pytest.raises(ValueError, match="must be None or a list in which each entry is a whole number"):
            config_lib.check_value(list[int] | None, ids, "ids")


def test_get_model_rejects_values_of_the_wrong_type():
    for name, value in (("num_layers", 2.0), ("num_layers", True), ("num_layers", "2"), ("norm_epsilon", "small")):
        with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
            get_model("gpt2-tiny", **{name: value})
    assert get_model("gpt2-tiny", num_layers=np.int64(3), norm_epsilon=0).config.num_layers == 3


def test_numpy_scalars_are_saved_as_numbers():
    config = get_model("gpt2-tiny", vocab_size=np.int64(200), norm_epsilon=np.float32(0.5)).config
    assert (type(config.vocab_size), type(config.norm_epsilon)) == (int, float), (
        "NumPy scalars must become int and float, because config.json of Hugging Face formats contains them"
    )
    written = config_lib.to_json(Outer(config, rate=np.float32(0.25), pairs=((np.int32(1), None),)))
    assert (written["model"]["vocab_size"], written["rate"], written["pairs"]) == (200, 0.25, [[1, None]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(seed=np.int64(2**40)), "seed=1099511627776 must be from 0 to 4294967295"),
        (lambda: TrainingConfig(steps=np.int32(0)), "steps=0 must be at least 1"),
        (lambda: get_model("lstm-tiny", init_bound=-0.5), "init_bound=-0.5 must be at least 0"),
        (lambda: get_model("gpt2-tiny", norm_epsilon=-1.0), "norm_epsilon=-1.0 must be at least 0"),
        (lambda: get_model("gpt2-tiny", init_stddev=-0.5), "init_stddev=-0.5 must be at least 0"),
        (lambda: Multipliers(head=math.nan), "multipliers.head=nan must be a finite number"),
        (lambda: OptimizerConfig(learning_rate=np.float32("nan")), "learning_rate=.*nan.* must be a finite number"),
    ],
)
def test_numbers_out_of_range_raise_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fields_may_be_scalars_of_numpy():
    model = get_model("gpt2-tiny", tie_embeddings=np.False_, activation=np.str_("relu"))
    assert (model.config.tie_embeddings, model.config.activation) == (False, "relu")
    assert type(model.config.tie_embeddings) is bool


def test_numbers_of_the_command_line_must_be_finite_and_in_range(capsys):
    for options, message in (
        (("--rate", "nan"), "program: rate=nan must be a finite number"),
        (("--rate", "inf"), "program: rate=inf must be a finite number"),
        (("--model.vocab-size", "99999999999"), "program: model.vocab_size=99999999999 is too large"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse(*options)
        assert capsys.readouterr().err.startswith(message)
    for pairs, message in (
        (((1, 0.5), (2, math.nan)), r"pairs\[1\]\[1\]=nan must be a finite number"),
        (((2**31, None),), r"pairs\[0\]\[0\]=2147483648 is too large"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.check_numbers(Outer(pairs=pairs))
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed={seed} must be from 0 to 4294967295"):
            config_lib.check_numbers(dataclasses.make_dataclass("Draws", ["seed"])(seed))
    with pytest.raises(ValueError, match="top_k=-9999999999 is too small: the smallest is -2147483648"):
        config_lib.check_numbers(dataclasses.make_dataclass("Limits", ["top_k"])(-9999999999))


def test_values_of_settings():
    """``name=value`` texts become typed values. A text without a name is an error."""
    texts = [
        "scan_layers=true",
        "tie_embeddings=False",
        "remat=full",
        "pools=(3, 4)",
        "num_layers=2",
        "window=None",
        "x={[]:1}",
    ]
    assert config_lib.assignments("set", texts) == {
        "scan_layers": True, "tie_embeddings": False, "remat": "full", "pools": (3, 4), "num_layers": 2, "window": None,
        "x": "{[]:1}",
    }  # fmt: skip
    with pytest.raises(ValueError, match="cannot read --xla 'a': write name=value, for example b=1"):
        config_lib.parse_assignments_as_text("xla", ["a"], "b=1")
    with pytest.raises(ValueError, match="cannot read --xla '=3': write name=value"):
        config_lib.parse_assignments_as_text("xla", ["=3"], "b=1")


def test_a_setting_must_not_be_given_twice():
    with pytest.raises(ValueError, match="--set has a twice: a=1 and a=2"):
        config_lib.assignments("set", ["a=1", "a=2"])


def test_error_for_a_damaged_file_and_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    for text, message in (("{", "is damaged"), ("[]", "must hold a JSON object"), ("\xff", "is damaged")):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            config_lib.read(Outer, path)
    config_lib.write(Outer(rate=0.75), path)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        config_lib.write(Outer(rate=0.25), path)
    assert config_lib.read(Outer, path).rate == 0.75


def parse(*arguments, presets=None):
    parsed = parse_experiment(
        Outer(), presets or {}, list(arguments), program="program", description="words", recipes={}
    )
    return parsed.config, parsed.resume


def test_options_of_nested_fields_are_typed(tmp_path, capsys):
    config, resume = parse("--model.num-layers", "6", "--path", "x", "--rate", "0.25")
    assert (config.model.num_layers, config.path, config.rate, resume) == (6, Path("x"), 0.25, None)
    with pytest.raises(SystemExit):
        parse("--model.num-layers", "six")
    with pytest.raises(SystemExit):
        parse("--model.num-layrs", "6")
    assert "--model.num-layers" in capsys.readouterr().err


def test_options_override_a_preset_or_a_resumed_run(tmp_path):
    presets = {"small": Outer(rate=0.125)}
    assert parse("--preset", "small", "--model.num-layers", "2", presets=presets)[0].rate == 0.125
    config_lib.write(Outer(rate=0.75), tmp_path / "config.json")
    config, resume = parse("--resume", str(tmp_path), "--model.num-layers", "2")
    assert (config.rate, config.model.num_layers, resume) == (0.75, 2, tmp_path)
    with pytest.raises(SystemExit):
        parse("--preset", "small", "--resume", str(tmp_path), presets=presets)
    with pytest.raises(SystemExit):
        parse("--preset", "large", presets=presets)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Number of blocks." in text
    assert "--resume" in text


@pytest.mark.plain_cases(6)  # a run of the default tests has only 6 of the cases
@pytest.mark.parametrize("name", TINY)
def test_a_family_refuses_unknown_values_of_choices(name):
    config = get_model(name).config
    fields = [
        field
        for field, hint in config_lib.field_types(type(config)).items()
        if "Literal" in str(hint) and "tuple" not in str(hint)
    ]
    assert "dtype" in fields
    for field in fields:
        with pytest.raises(ValueError, match=f"{field}='zzz' is unknown: choose from"):
            dataclasses.replace(config, **{field: "zzz"})


@dataclasses.dataclass(frozen=True)
class _Ranges(ModelConfig):
    size: int = 1
    window: int | None = None
    start_id: int = dataclasses.field(default=0, metadata={"minimum": 0})
    scale: float = -1.0
    input_dropout: float = 0.0
    output_dropout: float | None = None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", 0, "size=0 must be at least 1"),
        ("size", np.int64(-3), "size=-3 must be at least 1"),
        ("size", None, "size=None must be a whole number"),
        ("size", 2.5, "size=2.5 must be a whole number"),
        ("size", True, "size=True must be a whole number"),
        ("scale", None, "scale=None must be a finite number"),
        ("scale", float("nan"), "scale=nan must be a finite number"),
        ("window", 0, "window=0 must be at least 1"),
        ("start_id", -1, "start_id=-1 must be at least 0"),
        ("vocab_multiple", 0, "vocab_multiple=0 must be at least 1"),
        ("input_dropout", 1.0, r"input_dropout=1.0 must be in \[0, 1\)"),
        ("output_dropout", -0.1, r"output_dropout=-0.1 must be in \[0, 1\)"),
    ],
)
def test_the_base_class_checks_types_and_ranges(field, value, message):
    valid = {"size": 2, "window": 1, "start_id": 3, "input_dropout": 0.5, "output_dropout": 0.0}
    assert _Ranges(**valid).start_id == 3
    with pytest.raises(ValueError, match=message):
        _Ranges(**{**valid, field: value})


def test_an_annotation_with_an_unknown_name_is_named():
    @dataclasses.dataclass(frozen=True)
    class Broken(ModelConfig):
        mode: "Mode" = 1  # noqa: F821

    with pytest.raises(TypeError, match="an annotation of .*Broken has an unknown name .*Mode.*: define the name"):
        Broken()

"""A family of another package: it passes the contract; files, decoding and experiments find it by name."""

import dataclasses
import importlib.metadata
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from experiments import families
from experiments.laboratory import __main__ as laboratory
from jaxlm.cli import main
from jaxlm.data import CharTokenizer
from jaxlm.decoding import GenerationConfig, SpeculativeModels, generate, generate_text, speculative_generate
from jaxlm.interop import formats
from jaxlm.models import bert, family_names, registry, variant_names
from jaxlm.nn.scan import linear_scan
from jaxlm.nn.segments import segment_boundaries
from jaxlm.spec import ArraySpec, Normal
from jaxlm.tasks import text_generation
from jaxlm.testing.contract import *  # noqa: F403
from jaxlm.testing.helpers import initial_params, tiny_model
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.recipes import recipe
from jaxlm.training.trainer import carry_size_of
from tests import mingru

jaxlm.register_family("mingru", mingru)
FAMILIES = ("mingru",)


def test_a_registered_family_has_its_name_and_variants():
    assert "mingru" in family_names()
    assert variant_names()["mingru-tiny"] == "mingru"
    assert jaxlm.get_model("mingru", num_layers=1).config == mingru.Config(num_layers=1)
    jaxlm.register_family("mingru", mingru)  # a module may register itself again when it is imported again
    with pytest.raises(ValueError, match="did you mean 'mingru'"):
        jaxlm.get_model("mingruu")


def test_files_generation_and_training_settings_of_a_registered_family(tmp_path, capsys):
    tokenizer = CharTokenizer.from_text("to be, or not to be")
    model = jaxlm.get_model("mingru-tiny", vocab_size=tokenizer.vocab_size)
    params = initial_params(model)
    jaxlm.save_pretrained(tmp_path, model, params, tokenizer)
    loaded, loaded_params = jaxlm.load_pretrained(tmp_path)
    assert loaded == model
    (text,) = generate_text(loaded, loaded_params, tokenizer, ["to be"], GenerationConfig(max_new_tokens=5))
    assert main(["generate", str(tmp_path), "--prompt", "to be", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert text.removeprefix("to be") in capsys.readouterr().out
    text_generation.check_family(model)
    assert carry_size_of(model, 3) == (3, 1)
    assert recipe("mingru") == OptimizerConfig(warmup_steps=0.05)


def test_experiments_train_a_registered_family(tmp_path):
    assert families.main(["--family", "mingru", "--steps", "3", "--output", str(tmp_path / "run")]) == 0
    model, _ = jaxlm.load_pretrained(tmp_path / "run" / "mingru" / "model")
    assert model.family == "mingru"


def test_the_laboratory_trains_a_registered_family_and_puts_it_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(laboratory, "QUICK_STEPS", 2)
    output = ["--quick", "--output", str(tmp_path)]
    assert laboratory.main(["state_tracking", *output, "--model", "mingru", "--case", "parity"]) == 0
    assert laboratory.main(["--page", str(tmp_path / "docs"), *output]) == 0
    assert "| parity | mingru | 64 |" in (tmp_path / "docs" / "laboratory.md").read_text(encoding="utf-8")


def test_the_laboratory_names_a_field_that_a_registered_family_lacks(capsys, average):
    with pytest.raises(SystemExit):
        laboratory.main(["state_tracking", "--model", "average"])
    assert "family 'average' has no config field 'embed_dim'" in capsys.readouterr().err


@pytest.mark.thorough
def test_experiments_train_a_registered_family_with_another_objective(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    functions = {name: getattr(bert, name) for name in ("Config", "specs", "apply", "logits")}
    variants = {"masker-tiny": bert.VARIANTS["bert-tiny"]}
    jaxlm.register_family("masker", types.SimpleNamespace(**functions, VARIANTS=variants))
    assert families.main(["--family", "masker", "--steps", "3", "--output", str(tmp_path / "run")]) == 0
    assert "| masker | masked | adamw |" in (tmp_path / "run" / "table.md").read_text()


def test_an_installed_package_lists_families_as_entry_points(monkeypatch):
    point = importlib.metadata.EntryPoint("mingru2", "tests.mingru2", registry.ENTRY_POINT_GROUP)
    module = types.SimpleNamespace(**{name: getattr(mingru, name) for name in ("Config", "specs", "apply", "logits")})
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: module)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_entry_points", lambda: {"mingru2": point})
    assert jaxlm.get_model("mingru2").module is module
    with pytest.raises(ValueError, match="family .mingru2. has no variant whose name ends in .-tiny."):
        tiny_model("mingru2")


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("gpt", {}, ValueError, "family 'gpt' is already registered: choose another name"),
        ("mingru", {}, ValueError, "family 'mingru' is already registered"),
        ("a b", {}, ValueError, "name='a b' must be a Python identifier"),
        ("gpt2", {}, ValueError, "name='gpt2' is a variant of family 'gpt'"),
        ("other", {"VARIANTS": {"gpt": mingru.Config()}}, ValueError, "variant 'gpt' has the name of a family"),
        ("other", {"specs": None}, TypeError, "family 'other' has no specs"),
        ("other", {"Config": dict}, TypeError, "must be a frozen dataclass"),
        ("other", {"VARIANTS": {"a": 1}}, TypeError, "VARIANTS of family 'other' must be instances of its Config"),
        ("other", {"VARIANTS": {"mingru-tiny": mingru.Config()}}, ValueError, "already a variant of family 'mingru'"),
    ],
)
def test_bad_registrations_give_the_reason(name, changes, error, message):
    names = ("Config", "specs", "apply", "logits")
    attributes = {attribute: getattr(mingru, attribute) for attribute in names} | changes
    module = types.SimpleNamespace(**{key: value for key, value in attributes.items() if value is not None})
    with pytest.raises(error, match=message):
        jaxlm.register_family(name, module)
    assert "other" not in family_names()


def test_a_family_can_be_replaced(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    module = types.SimpleNamespace(**{name: getattr(mingru, name) for name in ("Config", "specs", "apply", "logits")})
    jaxlm.register_family("mingru", module, replace=True)
    assert registry.family("mingru") is module
    assert formats.of("mingru") == ()
    module.FORMATS = ("a format",)
    assert formats.of("mingru") == ("a format",)
    with pytest.raises(ValueError, match="family 'gpt' is already registered: choose another name"):
        jaxlm.register_family("gpt", module, replace=True)


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    """The config of a family without layers. It has none of the optional fields, such as ``vocab_multiple``."""

    vocab_size: int = 11
    width: int = 6


def average_specs(cfg):
    return {
        "table": ArraySpec((cfg.vocab_size, cfg.width), ("vocab", "embed"), Normal(1.0)),
        "scale": ArraySpec((), ()),
    }


def average_apply(cfg, params, tokens, *, state=None, segment_ids=None, key=None):
    segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    reset, keep, last = segment_boundaries(segments, None if state is None else state["segment_ids"])
    x = params["table"][tokens] + params["scale"]
    hidden = None if state is None else state["hidden"]
    hidden, last_hidden = linear_scan(jnp.full_like(x, 0.8), x, hidden, reset_BT=reset, keep_BT=keep)
    if state is None:
        return hidden, None
    return hidden, {"hidden": last_hidden, "segment_ids": last, "length": state["length"] + keep.sum(axis=1)}


def average_state_specs(cfg, batch, length):
    rows = ArraySpec((batch,), ("batch",), dtype=jnp.int32)
    hidden = ArraySpec((batch, cfg.width), ("batch", "embed"))
    return {"hidden": hidden, "segment_ids": rows, "length": rows}


@pytest.fixture
def average(monkeypatch):
    """A model whose state has arrays with the names of a key-value cache."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    module = types.SimpleNamespace(
        Config=AverageConfig, specs=average_specs, apply=average_apply, state_specs=average_state_specs,
        logits=lambda cfg, params, hidden: hidden @ params["table"].T,
    )  # fmt: skip
    jaxlm.register_family("average", module)
    model = jaxlm.get_model("average")
    return model, model.init(jax.random.key(0))


def test_files_of_a_family_with_a_scalar_parameter_and_no_optional_config_fields(tmp_path, average):
    jaxlm.save_pretrained(tmp_path, *average)
    loaded, loaded_params = jaxlm.load_pretrained(tmp_path)
    assert loaded == average[0]
    chex.assert_trees_all_equal(loaded_params, average[1])


@pytest.mark.thorough
def test_the_names_in_a_state_are_free(average):
    model, params = average
    assert not model.has_cache
    tokens = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    want = generate(model, params, tokens, max_new_tokens=4).tokens
    before = model.init_state(2, 8)
    _, state = model.apply(params, tokens[:, :2], state=before)
    np.testing.assert_array_equal(generate(model, params, tokens[:, 2:], max_new_tokens=4, state=state).tokens, want)
    models = SpeculativeModels(model, params, model, params, 2)
    proposed = speculative_generate(models, tokens[:, 2:], max_new_tokens=4, states=(state, state))
    np.testing.assert_array_equal(proposed.generation.tokens, want)
    kept = model.rollback(params, before, jnp.asarray(tokens[:, :2]), state, jnp.asarray([1, 1]))
    chex.assert_trees_all_close(kept, model.apply(params, tokens[:, :1], state=before)[1])


def test_a_package_that_cannot_be_loaded_is_named_and_does_not_break_other_families(monkeypatch):
    point = importlib.metadata.EntryPoint("broken", "tests.no_such_module", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"broken": point})
    assert jaxlm.get_model("gpt2-tiny").family == "gpt"
    with pytest.raises(ImportError, match=r"family 'broken' \(tests.no_such_module\) .* cannot be loaded: No module"):
        jaxlm.get_model("broken")


def test_files_of_an_unknown_family_name_the_fix(tmp_path):
    model = jaxlm.get_model("mingru-tiny")
    jaxlm.save_pretrained(tmp_path, model, initial_params(model))
    path = tmp_path / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("jaxlm-mingru", "jaxlm-hawk"), encoding="utf-8")
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"no family is called 'hawk': .* register it with jaxlm.register_family"):
        jaxlm.load_pretrained(tmp_path)

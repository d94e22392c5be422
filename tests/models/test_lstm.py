"""LSTM: published sizes. tests/oracles compares values and gradients; test_recurrent_families.py tests the rest."""

import dataclasses

import pytest

from jaxlm.models import get_model


def test_awd_lstm_has_the_published_number_of_parameters():
    model = get_model("awd-lstm")
    torch_second_biases = sum(layer["bias"].size for name, layer in model.specs.items() if name.startswith("layer_"))
    assert model.num_parameters + torch_second_biases == 24_221_600  # as awd-lstm-lm prints it


@pytest.mark.parametrize(("name", "millions"), [("lstm-zaremba-medium", 20), ("lstm-zaremba-large", 66)])
def test_zaremba_has_the_published_number_of_parameters(name, millions):
    model = get_model(name)
    assert round(model.num_parameters / 1e6) == millions
    assert model.config.dropout_mask == "fresh"


def test_names_of_dropout_fields():
    fields = {field.name for field in dataclasses.fields(get_model("lstm").config) if field.name.endswith("dropout")}
    assert fields == {"embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"}

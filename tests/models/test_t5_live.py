"""Compare T5 with ``transformers`` in addition to the oracle tests: generation, encoder-only models and buckets.

``python -m tests.models.test_t5_live`` writes ``goldens/t5_generate.npz``. Run it only when its case changes, not
because a test fails.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import t5
from jaxlm.nn.attention.bucket_bias import distance_buckets
from jaxlm.testing.helpers import relative_error
from tests.oracles import t5 as oracle

pytestmark = pytest.mark.live

GOLDEN = Path(__file__).parent / "goldens" / "t5_generate.npz"
STEPS = 12
SEGMENTS = np.array([[1] * 9, [0] * 4 + [1] * 5, [1] * 6 + [0] * 3], np.int32)
SOURCE = np.random.default_rng(7).integers(2, 30, SEGMENTS.shape).astype(np.int32)


def generate_reference(case: str) -> dict[str, np.ndarray]:
    """Cached greedy decoding of transformers for padded sources: encoder output, ids, logits of each step."""
    import torch

    model = oracle.build(case)
    source, mask = torch.tensor(SOURCE, dtype=torch.long), torch.tensor(SEGMENTS)
    encoded = model.encoder(input_ids=source, attention_mask=mask).last_hidden_state
    out = model.generate(
        input_ids=source, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=STEPS, eos_token_id=None,
        use_cache=True, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return {
        "encoded": encoded.detach().numpy(),
        "tokens": out.sequences.numpy().astype(np.int32),
        "logits": torch.stack(out.logits, dim=1).numpy(),
    }


def make_golden() -> None:
    with tempfile.TemporaryDirectory() as directory:
        oracle.build("left").save_pretrained(directory)
        _, params = load_pretrained(directory, scan_layers=True)
    weights = {f"params/{path}": np.asarray(leaf) for path, leaf in spec.flatten(params).items()}
    np.savez_compressed(GOLDEN, source=SOURCE, segments=SEGMENTS, **generate_reference("left"), **weights)


@pytest.mark.parametrize("case", ["base", "umt5"])
def test_cached_decoding_equals_generate(case, tmp_path):
    oracle.build(case).save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)
    want = generate_reference(case)
    state = t5.init_decode_state(model.config, params, SOURCE, STEPS, segment_ids=SEGMENTS)
    step = jax.jit(lambda tokens, state: model.apply(params, tokens, state=state))
    for position in range(STEPS):
        hidden, state = step(want["tokens"][:, position : position + 1], state)
        assert relative_error(model.logits(params, hidden)[:, 0], want["logits"][:, position]) < 1e-5


def test_an_encoder_only_model_is_read_and_written(tmp_path):
    import torch
    import transformers

    config = transformers.T5Config(**oracle.SMALL)
    torch.manual_seed(0)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert set(params) == {"token_embedding", "encoder"}
    save_pretrained(tmp_path / "ours", model, params)
    reloaded_model = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        want = reloaded_model(input_ids=torch.tensor(SOURCE, dtype=torch.long), attention_mask=torch.tensor(SEGMENTS))
    encoded = np.asarray(model.encode(params, SOURCE, segment_ids=SEGMENTS))
    real = SEGMENTS > 0
    assert relative_error(encoded[real], want.last_hidden_state.numpy()[real]) < 1e-5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 7), (16, 100), (64, 400), (128, 2048)])
def test_buckets_equal_transformers(bidirectional, buckets, max_distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-3 * max_distance, 3 * max_distance + 1)
    want = T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance).numpy()
    table = distance_buckets(buckets, max_distance, bidirectional=bidirectional)
    np.testing.assert_array_equal(table[np.clip(distance.numpy(), -max_distance, max_distance) + max_distance], want)


if __name__ == "__main__":
    make_golden()

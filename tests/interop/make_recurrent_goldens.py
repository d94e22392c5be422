"""Write ``recurrent_goldens.npz`` of ``test_recurrent.py``: the outputs of random recurrent layers of torch and Keras.

    KERAS_BACKEND=jax python tests/interop/make_recurrent_goldens.py

Needs torch and Keras 3. Run it only if a case changes, not because a test fails. Each case has the layer's weights in
the library's layout and the outputs for the common input [2, 5, 3].
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import torch

WIDTH = 4


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {"input": rng.standard_normal((2, 5, 3)).astype(np.float32)}

    def noise(shape: tuple[int, ...]) -> np.ndarray:
        return (0.7 * rng.standard_normal(shape)).astype(np.float32)

    for name, kind in (("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        for bias in (True, False):
            layer = kind(3, WIDTH, num_layers=2, bidirectional=True, batch_first=True, bias=bias)
            case = f"torch_{name}{'' if bias else '_no_bias'}"
            with torch.no_grad():
                for key, parameter in layer.named_parameters():
                    parameter.copy_(torch.from_numpy(noise(tuple(parameter.shape))))
                    arrays[f"{case}/{key}"] = parameter.numpy()
                arrays[f"{case}/output"] = layer(torch.from_numpy(arrays["input"]))[0].numpy()
    layers = {
        "lstm": keras.layers.LSTM(WIDTH, return_sequences=True),
        "lstm_no_bias": keras.layers.LSTM(WIDTH, return_sequences=True, use_bias=False),
        "gru_after": keras.layers.GRU(WIDTH, return_sequences=True),
        "gru_before": keras.layers.GRU(WIDTH, return_sequences=True, reset_after=False),
        "gru_after_no_bias": keras.layers.GRU(WIDTH, return_sequences=True, use_bias=False),
    }
    for name, layer in layers.items():
        layer.build((2, 5, 3))
        layer.set_weights([noise(x.shape) for x in layer.get_weights()])
        for number, x in enumerate(layer.get_weights()):
            arrays[f"keras_{name}/{number}"] = x
        arrays[f"keras_{name}/output"] = np.asarray(layer(arrays["input"]))
    np.savez_compressed(Path(__file__).parent / "recurrent_goldens.npz", **arrays)


if __name__ == "__main__":
    main()

"""Measurements of the speed and accuracy of jaxlm, most of them compared with PyTorch and Flax in the same run.

    python -m benchmarks.training      optimizer steps and losses of complete models
    python -m benchmarks.decoding      greedy generation with complete models
    python -m benchmarks.attention     attention over sequences and over key-value caches, with position biases
    python -m benchmarks.scans         linear recurrences and depthwise convolution, compared with plain JAX and torch
    python -m benchmarks.recurrence    LSTM and GRU layers, forward and backward
    python -m benchmarks.fidelity      largest differences between GPT-2 in jaxlm and in torch, with gradients
    python -m benchmarks.shootout      causal families of jaxlm, at equal parameter counts and at equal FLOPs
    python -m benchmarks.all           the benchmarks of docs/benchmarks.md, in sequence
    python -m benchmarks.report        tables and charts of docs/benchmarks.md, from the result files
    python -m benchmarks.nanogpt       nanoGPT's CPU configuration, from a text file to a validation loss
    python -m benchmarks.texts         translation and classification of sentences with trained models
    python -m benchmarks.speculative   speculative decoding with trained models, compared with plain decoding
    python -m benchmarks.plans         predictions of ``jaxlm plan``, compared with measurements

The benchmarks training, decoding, attention, scans and recurrence compare the speed of jaxlm with that of other
implementations, the baselines. torch, and Flax for complete models, need the extra ``reference``. Each implementation
is a class in a module ``*_baselines``, and runs in its own process (``worker``). ``harness`` first checks that the
results of all implementations agree. It then interleaves their repetitions, so that changes in the load of the machine
affect all of them.
"""

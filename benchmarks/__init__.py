"""How fast and how exact jaxlm is, beside torch and Flax on the same machine in the same run.

    python -m benchmarks.training      optimizer steps and losses of whole models
    python -m benchmarks.decoding      greedy generation of whole models
    python -m benchmarks.attention     attention of sequences and over caches, with position biases
    python -m benchmarks.scans         linear recurrences and depthwise convolution, beside plain forms of JAX
    python -m benchmarks.recurrence    LSTM and GRU layers, forward and backward
    python -m benchmarks.fidelity      largest differences to torch, gradients included
    python -m benchmarks.shootout      all causal families at equal parameters and at equal arithmetic
    python -m benchmarks.report        one page of tables and plots from all their results
    python -m benchmarks.nanogpt       nanoGPT's CPU configuration, from a text file to a validation loss

Peers need the extra ``reference``. Each lives in a process of its own (``worker``, ``*_peers``); ``harness`` lets them
take turns, so that one state of the machine serves all, and only after their results agree.
"""

"""What to train for: one file each, with the data side (``batch``) and the loss side (``loss``).

An objective is a module with ``Batch`` (arrays [B, T]), ``batch(window) -> Batch`` on the host, and
``loss(model, params, batch, *, key) -> (total, weight)``: a sum and what to divide it by, so that gradients accumulated
over parts of a batch equal those of the whole.
"""

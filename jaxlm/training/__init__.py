"""Training: the pure step (``trainer``), the loop with all side effects (``loop``), the Optax chain (``optimizer``)."""

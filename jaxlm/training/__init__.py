"""Training: ``step`` is pure, ``loop`` is the outer world, ``optimizer`` builds Optax transformations."""

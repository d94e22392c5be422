"""Training: ``trainer`` has the pure step, ``loop`` the side effects, ``optimizer`` the Optax transformations."""

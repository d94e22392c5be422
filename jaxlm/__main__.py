"""``python -m jaxlm``: see :mod:`jaxlm.cli`."""

from jaxlm.cli import run

run()

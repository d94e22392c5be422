"""``python -m jaxlm``: see :mod:`jaxlm.cli`."""

import sys

from jaxlm.cli import main

sys.exit(main())

"""All tests of the family contract for ``chess_llama``, whose blocks are those of the family ``llama``."""

import pytest

from jaxlm.testing.contract import *  # noqa: F403

pytestmark = pytest.mark.thorough
FAMILIES = ("chess_llama",)

"""A fixture for runs of experiments."""

import pytest

from jaxlm.training import plots


@pytest.fixture
def no_svg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write ``report.html`` with empty figures, because matplotlib takes most of the time of a report.

    For further runs in a module with a test that draws the whole report. The panels are still computed.
    """
    monkeypatch.setattr(plots, "svg", lambda panel, identifier: "<svg></svg>")

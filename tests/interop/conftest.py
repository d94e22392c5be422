"""Checksums of exports are not verified here, because these tests change files that were saved (see test_integrity)."""

import pytest

from jaxlm import integrity


@pytest.fixture(autouse=True)
def _no_checksums(monkeypatch):
    monkeypatch.setattr(integrity, "verify_checksums", lambda directory, names=None: None)

"""Tests that every family must pass (``contract``), and functions for tests (``helpers``). Needs pytest."""

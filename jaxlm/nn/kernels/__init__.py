"""Implementations of attention that are faster, or need less memory, than its reference definition."""

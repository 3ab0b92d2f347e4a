"""Figures, measured: one module a group, `python -m benchmarks.NAME` as root. Never timed tests."""

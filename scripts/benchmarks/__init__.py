"""Benchmarks behind ``scripts/bench.py``: each compares two sides in alternating runs and reports the median ratio."""

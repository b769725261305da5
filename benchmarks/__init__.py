"""Measurements of the replay stream; each module is run as `python -m benchmarks.<name>`."""

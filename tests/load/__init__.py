"""Load tests with the real perf_analyzer: `python -m tests.load --help`."""

"""Load tests with the real perf_analyzer: `python -m bench.load --help`."""

"""What docker/edge costs: `python -m bench.edge --help`."""

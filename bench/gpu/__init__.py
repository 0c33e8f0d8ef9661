"""GPU benchmarks: the network alone, served, and JPEG decoders. `python -m bench.gpu --help`."""

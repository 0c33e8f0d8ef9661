"""The network on a GPU: bare, served, and its JPEGs decoded there. `python -m bench.gpu --help`."""

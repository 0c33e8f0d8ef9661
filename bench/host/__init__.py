"""The host's part of an image: what feeds a GPU."""

"""The host's work per image, which limits how fast a GPU can be fed."""

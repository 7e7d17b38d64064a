"""Seconds below which no placement of a layer can come: by counting, then by a linear program."""

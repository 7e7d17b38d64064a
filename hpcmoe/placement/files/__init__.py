"""Placements and placement problems as files, ours and those of other engines."""

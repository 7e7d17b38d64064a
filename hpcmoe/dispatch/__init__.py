"""A token leaves for its experts and returns."""

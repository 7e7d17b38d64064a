"""What a user, a module or a launcher has set in the environment."""

import os


def read_setting(name):
    """Read what a user, a module or a launcher has set for MPI, or for what is below it -> text, "" where nothing."""
    return os.environ.get(name, "")

"""What a user wrote, as messages show it: on one line, printable and short."""


def printable(text: str) -> str:
    """Escape what would break a line, move a cursor or not show."""
    return text if text.isprintable() else "".join(c if c.isprintable() else escape(c) for c in text)


def escape(character: str) -> str:
    """Write a character as Python's strings do."""
    return character.encode("unicode_escape").decode("ascii")

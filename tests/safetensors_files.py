"""Safetensors files taken apart and put together again, by hand, as an attacker or an accident would."""

import json

LENGTH_BYTES = 8


def take_apart(path):
    """Read a file -> (its header, the bytes of its tensors)."""
    content = path.read_bytes()
    first = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    return json.loads(content[LENGTH_BYTES:first]), content[first:]


def put_together(path, header, data, length=None):
    """Write a file of a header, a dict or text, and the bytes of its tensors; length: what it says of its header."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(LENGTH_BYTES, "little") + text + data)


def edit_header(path, edit):
    """Change a file's header by edit(header), in place."""
    header, data = take_apart(path)
    edit(header)
    put_together(path, header, data)

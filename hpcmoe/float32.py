"""Numbers of the config that float32 arithmetic uses: their float32 value must still be what the key allows."""

import struct
import typing

SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32's normal numbers
FLOAT32_BYTES = 4
_LARGEST_BELOW_ONE = 1 - 2.0**-24  # float32's last number before 1


class InFloat32:
    """Marks, in the annotation of a key, a number that is used in float32."""


def find_range_error(value: float, annotation: object) -> str | None:
    """Return what a number must be that float32 would make 0, infinite or its own excluded bound, or None."""
    bounds = typing.get_args(annotation)[1:]
    if not any(isinstance(bound, InFloat32) for bound in bounds):
        return None
    if value != 0 and not SMALLEST_FLOAT32 <= abs(value) <= LARGEST_FLOAT32:
        zero = "" if any(getattr(bound, "gt", None) == 0 for bound in bounds) else "0, or "
        return f"must be {zero}from {SMALLEST_FLOAT32:.3g} to {LARGEST_FLOAT32:.3g}, for it is used in float32"
    if any(getattr(bound, "lt", None) == 1 for bound in bounds) and round_to_float32(value) >= 1:
        return f"must be at most {_LARGEST_BELOW_ONE:.8f}, for float32 makes it 1"
    return None


def round_to_float32(value: float) -> float:
    """Return the nearest float32 number."""
    return struct.unpack("f", struct.pack("f", value))[0]

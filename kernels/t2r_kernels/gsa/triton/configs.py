"""Launch configurations of the fast path, measured on one H200 at D = V = 128, M = 64 and groups of four heads."""

FORWARD = {"num_warps": 4, "num_stages": 2}
QUERY = {"num_warps": 4, "num_stages": 3}
QUERY_COLUMNS = 64
KEY = {"num_warps": 8, "num_stages": 2}
STATES = {"num_warps": 4, "num_stages": 3}
STATE_COLUMNS = 128
FORWARD_PROGRAMS = 2  # per multiprocessor: as many as fit at a time
KEY_PROGRAMS = 1
STATE_PROGRAMS = 3


def for_group(options: dict[str, int], group: int) -> dict[str, int]:
    """`options`, with twice the warps where more than four query heads make a tile of 128 rows."""
    return {**options, "num_warps": 8} if group > 4 else options

"""How a process that computed ends."""

import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process at once.

    The interpreter would first take torch's modules apart, for most of a second on a core that
    another replica may wait for. Threads end, and neither `atexit` nor finalisers run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

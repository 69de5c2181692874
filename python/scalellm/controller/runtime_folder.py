"""The folder of one deployment's sockets and generated files."""

import os
import tempfile
from pathlib import Path

from scalellm.errors import ServeError

# sun_path of sockaddr_un, less the terminating zero; the longest name in the folder must fit too.
_MAX_SOCKET_PATH_BYTES = 107
_LONGEST_NAME = "/engine-1023.sock"


def make_runtime_folder() -> Path:
    """A new folder that only its owner can enter (mode 0700); whoever makes it removes it.

    Below XDG_RUNTIME_DIR where that can be used, else below the folder for temporary files, else
    below /tmp: a Unix socket's path is limited to 107 bytes.
    """
    reasons = []
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if not base:
            continue
        try:
            folder = tempfile.mkdtemp(prefix="scalellm-", dir=base)
        except OSError as error:
            reasons.append(f"{base}: {error.strerror}")
            continue
        if len(os.fsencode(folder + _LONGEST_NAME)) <= _MAX_SOCKET_PATH_BYTES:
            return Path(folder)
        Path(folder).rmdir()
        reasons.append(f"{base}: too long for a socket's path")
    raise ServeError(f"no place for sockets ({'; '.join(reasons)}); set TMPDIR")

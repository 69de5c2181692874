"""A folder of packed weights, one file for each model and way to pack it, of bounded size.

    name-KEY.packed    complete, and from then on unchanged; its time is that of its last use
    name-KEY.partial   being written by the process that holds its lock; renamed when complete

KEY is over everything that decides the bytes: the kernels' version, every part's name, shape and
layout, and the checkpoint's files by path, size, time and header. Replicas that start together pack
once: the others wait for the lock. A writer's death gives the lock to the next, which begins anew.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from scalellm import _core
from scalellm.layers.weights import WeightSource
from scalellm.loader.checkpoint import Checkpoint
from scalellm.loader.packed_file import DamagedFileError, MappedWeights, Part, file_bytes, write

# Less is packed sooner than it is found.
LEAST_BYTES = 64 << 20
_FREE_BYTES = 1 << 30  # at most left on the disk: as much as is written, up to this
_ATTEMPTS = 3


class UncachedError(Exception):
    """Why packed weights can be no file; they are packed in memory then."""


@dataclass(frozen=True, slots=True)
class PackedCache:
    """Files in `folder`, together `limit_bytes` at most; the least recently used ones go first."""

    folder: Path
    limit_bytes: int

    def weights(
        self,
        name: str,
        identity: Sequence[object],
        plan: Sequence[Part],
        dtype: torch.dtype,
        open_source: Callable[[], AbstractContextManager[WeightSource]],
        checked: bool = False,
    ) -> tuple[MappedWeights, Path, bool]:
        """The parts of `plan`, mapped; their file; and whether it was written now.

        `identity` says, in JSON's types, what the parts are made of; `open_source` gives them where
        there is no sound file; `checked`: another process has just found it sound. Raises
        UncachedError, and what the source raises.
        """
        path = self.folder / f"{name}-{_key(identity, plan)}.packed"
        try:
            written = False
            for _ in range(_ATTEMPTS):
                with suppress(FileNotFoundError, DamagedFileError):
                    found = MappedWeights(path, plan, dtype, checked)
                    os.utime(path)
                    return found, path, written
                written |= self._write(path, plan, open_source)
        except OSError as error:
            raise UncachedError(f"{error.filename or path}: {error.strerror}") from None
        raise UncachedError(f"{path} is damaged as soon as it is written")

    def _write(
        self,
        path: Path,
        plan: Sequence[Part],
        open_source: Callable[[], AbstractContextManager[WeightSource]],
    ) -> bool:
        """Whether this process wrote `path`; if not, another one did meanwhile."""
        self._make_room(file_bytes(plan))
        with _locked(path.with_suffix(".partial")) as partial:
            if partial is None:
                return False
            partial.truncate(0)
            with open_source() as source:
                write(partial, plan, source)
            path.with_suffix(".partial").rename(path)
        return True

    def _make_room(self, wanted_bytes: int) -> None:
        """Remove abandoned writing and old files. Raises UncachedError if that does not do."""
        if wanted_bytes > self.limit_bytes:
            raise UncachedError(
                f"{wanted_bytes >> 20} MiB are more than --packed-cache-size "
                f"{self.limit_bytes >> 20} MiB"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("*.partial"):
            with _locked(partial, wait=False) as stream:
                if stream is not None:
                    partial.unlink()
        files = [(file, file.stat()) for file in self.folder.glob("*.packed")]
        files.sort(key=lambda entry: entry[1].st_mtime, reverse=True)
        left = self.limit_bytes - wanted_bytes
        for file, status in files:
            left -= status.st_size
            if left < 0:
                file.unlink(missing_ok=True)  # who has mapped it keeps it
        free = shutil.disk_usage(self.folder).free
        needed = wanted_bytes + min(wanted_bytes, _FREE_BYTES)
        if free < needed:
            raise UncachedError(
                f"{self.folder} has {free >> 20} MiB free, {needed >> 20} MiB are needed"
            )


def cache_folder(setting: str | None) -> Path | None:
    """What --packed-cache stands for; None for `none`."""
    if setting == "none":
        return None
    if setting is not None:
        return Path(setting).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "scalellm" / "packed"


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[BinaryIO | None]:
    """`path`, made if need be, alone; None if another process has it, or finished it meanwhile."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        try:
            current = path.stat().st_ino == os.fstat(stream.fileno()).st_ino
        except FileNotFoundError:
            current = False
        yield stream if current else None


def checkpoint_identity(checkpoint: Checkpoint) -> list[object]:
    """A checkpoint without its content: hashing gigabytes would be slower than packing them."""
    files: list[object] = []
    for file in sorted({tensor.file.resolve() for tensor in checkpoint.tensors.values()}):
        status = file.stat()
        with file.open("rb") as stream:
            header = stream.read(8)
            header += stream.read(int.from_bytes(header, "little"))
        digest = hashlib.blake2b(header, digest_size=16).hexdigest()
        files.append([str(file), status.st_size, status.st_mtime_ns, digest])
    return files


def _key(identity: Sequence[object], plan: Sequence[Part]) -> str:
    parts = [[part.name, part.kind] for part in plan]
    text = json.dumps([_core.CPU_MATRIX_VERSION, list(identity), parts])
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()

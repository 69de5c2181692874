"""A shape that starts beside another one takes the weights that are there, packed: no others."""

from pathlib import Path

import pytest

from ..integration.made_models import LARGER, made_model, spoil, with_weights
from ..integration.served import Serve
from ..integration.supervised import children, command_line
from .shapes import NARROW, WIDE, serve_two_shapes, switch
from .workload import Answer, ask, requests


def answers(served: Serve) -> list[Answer]:
    return [ask(served.url, body | {"max_tokens": 60})[0] for body in requests()[:4]]


def engines(served: Serve) -> set[int]:
    found = children(served.process.pid)
    return {pid for pid in found if b"\0engine\0" in command_line(pid)}


def maps(pid: int, file: Path) -> bool:
    """Whether a process has that very file in its memory, and not one that has its name."""
    inode = str(file.stat().st_ino)
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return any(line.split()[4:] == [inode, str(file)] for line in lines)


@pytest.mark.slow
@pytest.mark.needs("two-cores")
@pytest.mark.timeout(300)
def test_a_new_shape_maps_the_packed_weights(tmp_path: Path) -> None:
    weights = with_weights(made_model(tmp_path / "model", **LARGER))
    cache = tmp_path / "packed"
    served = serve_two_shapes(
        tmp_path, "--packed-cache", str(cache), model=f"demo={weights.parent}"
    )
    try:
        (packed,) = cache.iterdir()
        inode, size = packed.stat().st_ino, packed.stat().st_size
        expected = answers(served)
        spoil(weights)  # who reads them again gives other answers, or none
        old = engines(served)
        for blueprint in (NARROW, WIDE):
            switch(served, blueprint)
            new = engines(served)
            assert len(new) == blueprint[0]["count"] and not new & old
            assert all(maps(pid, packed) for pid in new)
            assert answers(served) == expected
            old = new
        assert list(cache.iterdir()) == [packed]
        assert (packed.stat().st_ino, packed.stat().st_size) == (inode, size)
    finally:
        served.close()

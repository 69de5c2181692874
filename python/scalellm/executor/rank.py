"""`python -m scalellm.executor.rank`: every rank of a replica but the first.

    rank 0   --memory, logits-->  files that all map
             --control-->         one line: what to load;  its end: rank 0 has ended
             <--control--         one line: loaded, or why not; before it one when it is there,
                                  if ranks then have to find each other

Of ranks on several hosts each finds rank 0 by its address (hosts.py) and has the files to itself.

It computes what rank 0's letters say until one says stop. It has no listener, no loop and no
scheduler, and its answers lie in the shared memory.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scalellm.config import EngineConfig
from scalellm.errors import EngineError
from scalellm.executor.hosts import come, connect, places_told
from scalellm.executor.leave import leave
from scalellm.executor.seat import FOLLOWED, LOGITS, STOP, Seat, Sizes, read_letter
from scalellm.executor.single import SingleExecutor
from scalellm.kernels.exchange import Exchange
from scalellm.kernels.exchange.distributed import LOOPBACK, TorchExchange, find_meeting
from scalellm.loader.device import choose_device, use_device
from scalellm.loader.digest import weights_digest
from scalellm.loader.load import check_ranks

Links = Sequence[socket.socket | None] | None  # to all ranks; None where all are on one host


def order(
    rank: int,
    config: EngineConfig,
    sizes: Sizes,
    num_blocks: int | None = None,
    meeting: int | None = None,
) -> bytes:
    """What rank 0 asks a rank to load: with so many KV blocks, or as all ranks agree, whose
    exchange meets at the port `meeting`."""
    engine = asdict(config) | {"model_path": str(config.model_path)}
    told = {"rank": rank, "engine": engine, "sizes": asdict(sizes)}
    if config.nnodes > 1:
        told["weights"] = weights_digest(config.model_path, config.load_format, config.seed)
    return json.dumps(told | {"num_blocks": num_blocks, "meeting": meeting}).encode() + b"\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("control", "memory", "logits", "rank", "port"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--master")
    parser.add_argument("--own", default="{}", help="settings of this host, as JSON")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Rank 0 decides when to stop, also where a terminal signals both.
        signal.signal(number, signal.SIG_IGN)
    links: Links = None
    if given.master is None:
        control = socket.socket(fileno=given.control)
    else:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            control, links = _find(given.master, given.port, given.rank)
        except (EngineError, OSError, ValueError) as error:
            sys.stderr.write(f"rank {given.rank}: {error}\n")
            return 1
    stream = control.makefile("rwb")
    line = stream.readline()
    if not line:
        return 0
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    told = json.loads(line)
    told["engine"] |= json.loads(given.own)
    try:
        _check_weights(told)
        if told["meeting"] is not None:
            stream.write(b"{}\n")
            stream.flush()
        executor, seat = _load(told, given.memory, given.logits, links)
    except Exception as error:
        stream.write(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        stream.flush()
        return 1
    stream.write(b"{}\n")
    stream.flush()
    while True:
        try:
            kind, arrays = read_letter(seat.ranks.receive())
            if kind == STOP:
                return 0
            if kind == LOGITS:
                executor.logits_of(arrays)
            else:
                executor.greedy_of(arrays, followed=kind == FOLLOWED)
        except ConnectionAbortedError:
            return 0  # rank 0 says why
        except BaseException:
            seat.give_up()
            raise


def _find(host: str, port: int, rank: int) -> tuple[socket.socket, Links]:
    """Connections to rank 0, for what it says, and to all ranks. Raises EngineError, OSError."""
    control, listener = come((host, port), rank)
    with listener:
        places, key = places_told(control)
        return control, connect(rank, places, key, listener)


def _check_weights(told: dict[str, Any]) -> None:
    """Raises EngineError where those of this host are not rank 0's."""
    engine = told["engine"]
    expected, folder = told.get("weights"), Path(engine["model_path"])
    if expected is None:  # rank 0's host is this
        return
    if weights_digest(folder, engine["load_format"], engine["seed"]) != expected:
        raise EngineError(f"{folder} has another model there, or another revision, than rank 0 has")


def _load(
    told: dict[str, Any], memory: int | None, logits: int | None, links: Links
) -> tuple[SingleExecutor, Seat]:
    engine = told["engine"]
    config = EngineConfig(**engine | {"model_path": Path(engine["model_path"])})
    os.nice(config.compute_nice)
    rank, sizes = told["rank"], Sizes(**told["sizes"])
    exchange: Exchange | None = None
    if told["meeting"] is not None:
        found = check_ranks(config)
        here = sizes.ranks // config.nnodes
        device = choose_device(config.device, rank % here, here, config.first_device)
        host, own = LOOPBACK, LOOPBACK
        if link := None if links is None else links[0]:
            host, own = link.getpeername()[0], link.getsockname()[0]
        store = find_meeting(told["meeting"], sizes.ranks, host)
        exchange = TorchExchange(store, rank, sizes.ranks, device, found.dtype, own, config.nnodes)
    if memory is None or logits is None:
        memory, logits = os.memfd_create("scalellm-ranks"), os.memfd_create("scalellm-logits")
        os.ftruncate(memory, sizes.memory_bytes)
        os.ftruncate(logits, sizes.logits_bytes)
    parallel, hosts = config.enable_expert_parallel, config.nnodes
    seat = Seat.take(rank, sizes, parallel, memory, logits, exchange, hosts, links)
    executor = SingleExecutor.load_part(config, seat=seat, num_blocks=told["num_blocks"])
    use_device(executor.device)
    torch.set_num_threads(config.cpu_threads or 1)
    return executor, seat


def _end_with_parent() -> None:
    """End this process when the one that started it has ended."""
    os.read(0, 1)
    os._exit(0)


def _end_with(control: socket.socket) -> None:
    """End this process, whatever it does, when rank 0 has ended."""
    with contextlib.suppress(OSError):  # a host that is gone, or its connection reset
        while control.recv(1, socket.MSG_PEEK):
            pass
    os._exit(0)


if __name__ == "__main__":
    leave(main())

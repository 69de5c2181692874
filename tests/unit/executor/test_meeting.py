"""How ranks of several hosts find each other, and notice that one is gone."""

import contextlib
import errno
import json
import os
import socket
import struct
import threading
import time

import pytest

from scalellm._core import __version__
from scalellm.errors import EngineError
from scalellm.executor import hosts
from scalellm.executor import rank as other_rank
from scalellm.executor.followers import Followers
from scalellm.executor.hosts import Meeting, come, connect, places_told

HERE = "127.0.0.1"


def test_three_ranks_find_each_other_and_nobody_else():
    meeting = Meeting(HERE, 0)
    found = {}

    def one(rank):
        control, listener = come(meeting.address, rank)
        found[rank] = connect(rank, *places_told(control), listener)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (2, 1)]
    for thread in threads:
        thread.start()
    with socket.create_connection(meeting.address) as stranger:
        stranger.sendall(b'{"rank": 7, "port": 1, "version": "?"}\n')
        controls, places = meeting.wait(3)
    with socket.create_connection(places[0]) as stranger:
        stranger.sendall(b"\0" * 20)  # not the key
        for control in controls:
            line = json.dumps({"places": places, "key": meeting.key}).encode()
            control.sendall(line + b"\n")
        found[0] = connect(0, places, meeting.key, meeting.listener)
    for thread in threads:
        thread.join()
    for rank, links in found.items():
        assert links[rank] is None
        for other, link in enumerate(links):
            if other > rank:
                link.sendall(bytes([rank, other]))
    for rank, links in found.items():
        for other in range(rank):
            # A rank may be late: what it does not take for a while must not end its connection.
            assert not links[other].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert links[other].recv(2) == bytes([other, rank])
    for link in [*controls, *(link for links in found.values() for link in links if link)]:
        link.close()
    meeting.close()


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "COME_WITHIN_S", 0.05)
    meeting = Meeting(HERE, 0)
    with pytest.raises(EngineError, match=r"ranks \[1, 2\] have not come to 127.0.0.1:"):
        meeting.wait(3)
    meeting.close()


def test_a_rank_of_this_host_that_ends_is_not_waited_for():
    def check():
        raise EngineError("rank 1 ended")

    meeting = Meeting(HERE, 0)
    with pytest.raises(EngineError, match="rank 1 ended"):
        meeting.wait(2, check)
    meeting.close()


def test_connections_notice_a_host_that_says_nothing_any_more():
    """Within two seconds; no host is unplugged here, so what the kernel was told is looked at."""
    with socket.socket() as connection:
        hosts.watch_over(connection)
        told = connection.getsockopt
        assert told(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert told(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2000
        idle_s, every_s, count = (
            told(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle_s + every_s * count <= 2


def test_a_port_that_is_taken_is_named():
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"--master-port {port}: cannot listen"):
            Meeting(HERE, port)


# ------------------------------------------------------------ who is refused


def say(meeting, **told):
    """What a rank says; its connection."""
    control = socket.create_connection(meeting.address)
    usual = {"version": __version__, "rank": 1, "port": 1}
    control.sendall(json.dumps(usual | told).encode() + b"\n")
    return control


@pytest.mark.parametrize(
    "line",
    [b"", b"[" * 60000, b"[]", b'{"rank": 1}', b"\xff", b'{"version": [], "rank": 1, "port": 1}'],
    ids=lambda line: line[:20],
)
def test_whoever_says_something_else_is_not_let_in(line):
    meeting = Meeting(HERE, 0)
    with socket.create_connection(meeting.address) as stranger:
        stranger.sendall(line + b"\n")
        with say(meeting):
            (control,), _ = meeting.wait(2)
        control.close()
        assert "error" in json.loads(stranger.makefile("rb").readline())
    meeting.close()


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"version": "0.0.0"}, f"version 0.0.0, here {__version__}"),
        ({"rank": 2}, "its rank is not one of 1 to 1"),
        ({"rank": 1.0}, "its rank is not one of 1 to 1"),
        ({"port": 70000}, "its port is not one of 1 to 65535"),
        ({"port": float("inf")}, "its port is not one of 1 to 65535"),
    ],
    ids=str,
)
def test_a_rank_that_is_refused_is_told_why(told, reason, caplog):
    meeting = Meeting(HERE, 0)
    with say(meeting, **told) as refused, say(meeting):
        (control,), _ = meeting.wait(2)
        control.close()
        with pytest.raises(EngineError, match=f"rank 0 refuses it: {reason}"):
            places_told(refused)
    assert reason in caplog.text
    meeting.close()


def test_a_rank_takes_the_place_of_one_that_is_gone_and_of_no_other():
    meeting = Meeting(HERE, 0)
    say(meeting, port=1).close()
    with say(meeting, port=2), say(meeting, port=3) as refused, say(meeting, rank=2, port=4):
        controls, (_, *places) = meeting.wait(3)
        assert [port for _, port in places] == [2, 4]
        with pytest.raises(EngineError, match="rank 1 is here already"):
            places_told(refused)
    for control in controls:
        control.close()
    meeting.close()


def test_rank_0_that_ends_meanwhile_is_named():
    meeting = Meeting(HERE, 0)
    with say(meeting) as control:
        (first,), _ = meeting.wait(2)
        first.close()
        meeting.close()
        with pytest.raises(EngineError, match="rank 0 has ended"):
            places_told(control)


def test_one_that_never_ends_its_line_does_not_keep_others_out(monkeypatch):
    """Nor does it keep `check` from being asked."""
    monkeypatch.setattr(hosts, "_SPEAK_WITHIN_S", 0.1)
    asked = []
    meeting = Meeting(HERE, 0)
    with socket.create_connection(meeting.address) as slow:
        dripping = threading.Thread(target=drip, args=(slow,))
        dripping.start()
        with say(meeting):
            (control,), _ = meeting.wait(2, lambda: asked.append(1))
        control.close()
        assert len(asked) >= 2
        dripping.join()
    meeting.close()


def drip(connection):
    """A byte at a time, until the other side hangs up."""
    with contextlib.suppress(ConnectionError):
        while True:
            connection.sendall(b" ")
            time.sleep(0.01)


def test_strangers_do_not_end_the_start(monkeypatch):
    """One that hangs up, one that says nothing, one that is reset."""
    monkeypatch.setattr(hosts, "_SPEAK_WITHIN_S", 0.1)
    key = "ab" * 16
    with socket.create_server((HERE, 0)) as listener:
        own = listener.getsockname()
        socket.create_connection(own).close()
        reset = socket.create_connection(own)
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        with socket.create_connection(own), socket.create_connection(own) as right:
            right.sendall(bytes.fromhex(key) + (1).to_bytes(4, "big"))
            links = connect(0, [own, (HERE, 1)], key, listener)
            assert links[0] is None
            assert links[1].getpeername() == right.getsockname()
            links[1].close()


def test_strangers_do_not_keep_a_start_from_its_end(monkeypatch):
    monkeypatch.setattr(hosts, "_CONNECT_WITHIN_S", 0.1)
    with socket.create_server((HERE, 0)) as listener:
        own = listener.getsockname()
        said = "rank 0 cannot reach the other ranks: timed out"
        with socket.create_connection(own), pytest.raises(EngineError, match=said):
            connect(0, [own, (HERE, 1)], "ab" * 16, listener)


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_hosts_may_have_addresses_of_ipv6():
    meeting = Meeting("::1", 0)
    control, listener = come(meeting.address, 1)
    (first,), places = meeting.wait(2)
    assert places[1] == ("::1", listener.getsockname()[1])
    for connection in (control, listener, first):
        connection.close()
    meeting.close()


# ------------------------------------------------------------ a host that is gone


def test_a_rank_ends_when_its_connection_to_rank_0_is_reset(monkeypatch):
    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    with socket.create_server((HERE, 0)) as listener:
        control = socket.create_connection(listener.getsockname())
        first, _ = listener.accept()
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        first.close()
    with control, pytest.raises(Ended):
        other_rank._end_with(control)


class Gone(socket.socket):
    """A connection of which the kernel has found that nobody answers."""

    def __init__(self, error):
        super().__init__()
        self._error = error

    def recv_into(self, *_):
        raise OSError(self._error, "gone")


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.EHOSTUNREACH])
def test_a_host_that_is_gone_while_it_loads_is_named(monkeypatch, error):
    followers = Followers(2, hosts=2, meeting=Meeting(HERE, 0))
    monkeypatch.setattr(followers, "_controls", [Gone(error)])
    with pytest.raises(EngineError, match="rank 1, on another host, has ended"):
        followers.wait_done()
    followers.kill()

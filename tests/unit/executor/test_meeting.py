"""How ranks of several hosts find each other, and notice that one is gone."""

import errno
import json
import os
import socket
import struct
import threading

import pytest

from scalellm.errors import EngineError
from scalellm.executor import hosts
from scalellm.executor import rank as other_rank
from scalellm.executor.followers import Followers
from scalellm.executor.hosts import Meeting, come, connect, read_line

HERE = "127.0.0.1"


def test_three_ranks_find_each_other_and_nobody_else():
    meeting = Meeting(HERE, 0)
    found = {}

    def one(rank):
        control, listener = come(meeting.address, rank)
        told = json.loads(read_line(control))
        found[rank] = connect(rank, told["places"], told["key"], listener)

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

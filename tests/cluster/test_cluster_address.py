"""Whether Ray listens at an address is known in seconds."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from revdist.cluster.address import check_reachable, parse_address
from revdist.cluster.local import ray_cluster
from revdist.errors import AddressUnreachable


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def web_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent_server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_addresses_are_host_and_port() -> None:
    assert parse_address("10.0.0.5:6379") == ("10.0.0.5", 6379)
    assert parse_address("[::1]:6379") == ("::1", 6379)
    for wrong in ("10.0.0.5", ":6379", "host:", "host:port", "host:70000"):
        with pytest.raises(AddressUnreachable, match="HOST:PORT"):
            parse_address(wrong)


def test_nothing_listens_there(free_port: int) -> None:
    with pytest.raises(AddressUnreachable, match=f"nothing listens at 127.0.0.1:{free_port}") as caught:
        check_reachable(f"127.0.0.1:{free_port}")
    assert caught.value.exit_code == 2


def test_what_listens_is_not_ray(web_server: str) -> None:
    with pytest.raises(AddressUnreachable, match="is not a Ray cluster"):
        check_reachable(web_server)


def test_what_listens_says_nothing(silent_server: str) -> None:
    with pytest.raises(AddressUnreachable, match="no answer"):
        check_reachable(silent_server, timeout_s=0.1)


def test_a_name_nobody_has() -> None:
    with pytest.raises(AddressUnreachable, match="no host"):
        check_reachable("no-such-host.invalid:6379")


def test_a_run_fails_in_seconds_not_in_twenty(free_port: int) -> None:
    began_s = time.monotonic()
    with pytest.raises(AddressUnreachable), ray_cluster(f"127.0.0.1:{free_port}", num_workers=1):
        raise AssertionError("unreachable")
    assert time.monotonic() - began_s < 10

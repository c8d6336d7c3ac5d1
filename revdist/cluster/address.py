"""Finding out in seconds whether a Ray cluster listens at an address, which `ray.init` does not."""

from __future__ import annotations

import socket

from revdist.errors import AddressUnreachable

_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""HTTP/2's preface and an empty SETTINGS frame: what any gRPC client says first."""
_SETTINGS = 4


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`. Raises AddressUnreachable for anything else."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise AddressUnreachable(f"{address!r} is not an address: write auto or HOST:PORT, such as 10.0.0.5:6379")
    return host.strip("[]"), int(port)


def takes_connections(host: str, port: int, *, timeout_s: float) -> bool:
    """Whether something listens there and can be reached; what it is, is not asked."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def check_reachable(address: str, *, timeout_s: float = 3.0) -> None:
    """Raise AddressUnreachable unless something that speaks gRPC, as Ray does, listens at `HOST:PORT`."""
    host, port = parse_address(address)
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.settimeout(timeout_s)
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
    except socket.gaierror:
        raise AddressUnreachable(f"no host {host!r}: check the name, or give its IP address", address=address) from None
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or "no answer"
        raise AddressUnreachable(
            f"nothing listens at {address} ({reason.lower()}): start Ray there with `ray start --head --port {port}`, "
            "or leave --address out for a local cluster",
            address=address,
        ) from None
    if len(answer) < 9 or answer[3] != _SETTINGS:
        raise AddressUnreachable(
            f"what listens at {address} is not a Ray cluster: give the port that `ray start` printed, 6379 by default",
            address=address,
        )

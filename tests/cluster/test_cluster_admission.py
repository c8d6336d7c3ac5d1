"""A cluster's refusal is told at once: a stand-in for Ray's head that speaks its protocol, token included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray._raylet import AuthenticationTokenLoader, Config
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from revdist.cluster.admission import check_admission, token_source
from revdist.errors import AddressUnreachable

TOKEN = "0123456789abcdef" * 4


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """Answers whether it is alive to those who have its token, if it has one."""

    def __init__(self, token: str | None, version: str) -> None:
        self._token = token
        self._version = version

    def CheckAlive(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - as Ray calls it
        given = dict(context.invocation_metadata()).get("authorization")
        if self._token is not None and given != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.CheckAliveReply(ray_version=self._version)


@pytest.fixture
def head() -> Iterator[Callable[..., str]]:
    """Starts stand-ins; returns their address."""
    servers = []

    def start(token: str | None = None, version: str = ray.__version__) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(token, version), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait(timeout=10)


@pytest.fixture
def my_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str | None], None]]:
    """Sets this process's token, as Ray reads it."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def reread() -> None:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    def choose(token: str | None) -> None:
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled" if token is None else "token")
        if token is not None:
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        reread()

    yield choose
    monkeypatch.undo()
    reread()


def test_the_right_token_and_an_open_cluster_pass(
    head: Callable[..., str], my_token: Callable[[str | None], None]
) -> None:
    my_token(TOKEN)
    check_admission(head(TOKEN))
    check_admission(head(None))
    my_token(None)
    check_admission(head(None))


@pytest.mark.parametrize(
    ("token", "said"), [("f" * 64, "refuses the token in RAY_AUTH_TOKEN"), (None, "asks for a token, and this process")]
)
def test_a_wrong_token_and_none_are_refused_with_a_remedy(
    head: Callable[..., str], my_token: Callable[[str | None], None], token: str | None, said: str
) -> None:
    my_token(token)
    with pytest.raises(AddressUnreachable, match=said) as refused:
        check_admission(head(TOKEN))
    assert "~/.ray/auth_token" in refused.value.message


def test_another_ray_is_named_with_both_versions(
    head: Callable[..., str], my_token: Callable[[str | None], None]
) -> None:
    my_token(None)
    with pytest.raises(AddressUnreachable, match=rf"runs Ray 2\.1\.0, and this process {ray.__version__}"):
        check_admission(head(version="2.1.0"))


def test_no_answer_is_left_to_ray(my_token: Callable[[str | None], None]) -> None:
    my_token(None)
    check_admission("127.0.0.1:1", timeout_s=0.2)


def test_the_token_is_where_ray_looks_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert token_source() == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    assert token_source() == str(tmp_path / ".ray" / "auth_token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere")
    assert token_source() == "/elsewhere"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert token_source() == "RAY_AUTH_TOKEN"

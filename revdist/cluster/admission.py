"""Whether a Ray cluster lets this process in, asked in a fraction of a second: `ray.init` tries for twenty.

Ray is imported by now, its settings and token read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from revdist.errors import AddressUnreachable

_REMEDY = (
    "put the cluster's token into ~/.ray/auth_token, or into RAY_AUTH_TOKEN with RAY_AUTH_MODE=token "
    "(on its head, `ray get-auth-token` prints it)"
)


def check_admission(address: str, *, timeout_s: float = 3.0) -> None:
    """Raise AddressUnreachable where the cluster at `HOST:PORT` refuses this process's token, or is of another Ray.

    A cluster that does not answer in time passes: why not is for `ray.init` to find out.
    """
    import grpc  # type: ignore[import-untyped]
    import ray
    from ray._private.authentication import grpc_authentication_client_interceptor as authentication
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    credentials: Any = authentication._get_authentication_metadata_tuple()
    with grpc.insecure_channel(address) as channel:
        gcs: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
        question: Any = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined,unused-ignore]
        try:
            answer = gcs.CheckAlive(question, timeout=timeout_s, metadata=credentials)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise AddressUnreachable(_refused(address, had_token=bool(credentials)), address=address) from None
            return
    if answer.ray_version and answer.ray_version != ray.__version__:
        raise AddressUnreachable(
            f"the cluster at {address} runs Ray {answer.ray_version}, and this process {ray.__version__}; "
            f"`pip install 'ray[default]=={answer.ray_version}'` here, or start the cluster with this one's",
            address=address,
        )


def _refused(address: str, *, had_token: bool) -> str:
    if had_token:
        return f"the Ray cluster at {address} refuses the token in {token_source()}: it has another one; {_REMEDY}"
    return f"the Ray cluster at {address} asks for a token, and this process has none; {_REMEDY}"


def token_source() -> str:
    """Where Ray takes this process's token from, in the order in which it looks; empty: it has none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return path
    default = Path.home() / ".ray" / "auth_token"
    return str(default) if default.is_file() else ""

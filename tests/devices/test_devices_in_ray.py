"""Ray finds the fake driver's GPUs by itself, and revdist's NVML code reads them inside an actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_driver import FakeDriver

from revdist.devices.cpu import CpuDevice

MIB = 2**20


def _hold_in_an_actor(env: dict[str, str], uuid: str) -> tuple[dict[str, float], Any, Any, int]:
    import ray

    class Replica:
        def hold(self, num_bytes: int) -> tuple[Any, int]:
            """Charges memory to the ledger below the GPU, and reads the GPU."""
            import os

            from revdist.devices import open_device
            from revdist.devices.co_tenant import CoTenant

            self.tenant = CoTenant(CpuDevice.open("gpu-1"))
            self.tenant.take(num_bytes, patience_s=1)
            return open_device(uuid=uuid).read(), os.getpid()

    ray.init(
        address="local",
        num_cpus=2,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": env},
    )
    try:
        actor = ray.remote(num_gpus=1)(Replica).remote()
        reading, pid = ray.get(actor.hold.remote(20 * MIB))
        return ray.cluster_resources(), reading, ray.nodes()[0]["Labels"], pid
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_ray_and_an_actor_see_the_fake_gpus(
    fake_driver: FakeDriver, ledger_device: Callable[..., CpuDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    first = ledger_device(80 * MIB, "gpu-0")
    second = ledger_device(40 * MIB, "gpu-1")
    fake_driver.add_gpu(first.ledger_path)
    uuid = fake_driver.add_gpu(second.ledger_path, name="NVIDIA H100 80GB HBM3")
    env = {**fake_driver.env, "REVDIST_DEVICES_DIR": str(first.ledger_path.parent)}
    resources, reading, labels, pid = fake_driver.call(_hold_in_an_actor, env, uuid)
    assert resources["GPU"] == 2
    assert resources["accelerator_type:A100"] == 1  # Ray names a node by its first GPU
    assert labels["ray.io/accelerator-type"] == "A100"
    assert (reading.uuid, reading.free_bytes) == (uuid, 20 * MIB)
    assert [(holder.pid, holder.used_bytes) for holder in reading.holders] == [(pid, 20 * MIB)]
    assert second.read().free_bytes == 40 * MIB  # the actor ended with its cluster

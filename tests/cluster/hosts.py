"""Several hosts on one machine: a network, pid, mount and uts namespace each, joined by a bridge.

Nothing of it exists outside: the bridge lies in a namespace of its own, addresses exist only inside, and
there is no route out. Each host's first process waits for its input to close. It closes when the test
leaves the network, and also when the test's process is killed, and the kernel then ends everything on
that host and removes its devices and mounts. Killing that process is how a host loses power.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import psutil

SUBNET = "10.211.0"
RAY_PORT = 6379
_PATIENCE_S = 60.0
_ROOT = Path(__file__).parent.parent.parent
_PATHS = (_ROOT, _ROOT / "tests" / "training", _ROOT / "tests" / "cluster")

PYTHON = sys.executable
REVDIST = (PYTHON, "-m", "revdist.cli")
_RAY = str(Path(sys.executable).with_name("ray"))

_WAIT_FOR_THE_END = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); sys.stdin.read()"
"""A host's first process: it lets the kernel collect orphans, as init does."""
_BOOT = """
set -e
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
mount --bind {hosts} /etc/hosts
mount --bind {resolver} /etc/resolv.conf
hostname {name}
echo booted
exec {python} -c {wait}
"""


def why_not() -> str | None:
    """What keeps this machine from being several hosts; None where nothing does."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"hosts on one machine need {', '.join(missing)} (packages iproute2, util-linux and hostname)"
    if os.geteuid() != 0:
        return "hosts on one machine need root, for network namespaces"
    return _what_the_kernel_refuses()


@functools.cache
def _what_the_kernel_refuses() -> str | None:
    tried = subprocess.run(
        [*_UNSHARE, "sh", "-c", "mount -t tmpfs t /dev/shm && ip link add name veth-a type veth peer name veth-b && "
         "ip link add name bridge-a type bridge"],
        capture_output=True, text=True, timeout=_PATIENCE_S,
    )  # fmt: skip
    return None if tried.returncode == 0 else f"this machine makes no namespaces: {tried.stderr.strip()}"


_UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc")


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """What a finished command left."""

    returncode: int
    text: str
    """Standard output and standard error as they came."""


@final
class Host:
    """A machine as far as its processes can tell. Made by `Network.add`."""

    def __init__(self, name: str, address: str, folder: Path, wire: _Namespace, hosts_file: Path) -> None:
        self.name = name
        self.address = address
        self.home = folder / name
        self.is_on = True
        self._wire = wire
        self._hosts_file = hosts_file
        self._port = f"to-{name}"
        self._popens: list[subprocess.Popen[Any]] = []
        self._numbers = itertools.count(1)
        self.home.mkdir()
        (self.home / "resolv.conf").touch()  # without a name server, look-ups fail at once
        self._namespace = self._boot()
        self._connect()

    @property
    def environment(self) -> dict[str, str]:
        """Of every command: the machine's own, less what points to one of its folders."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("REVDIST_", "RAY_", "GLOO_"))}
        return {
            **kept,
            "HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(map(str, _PATHS)),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def popen(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, **more: Any) -> Any:
        """Start a command on this host, in its home folder; it ends with the host."""
        more = {"stdin": subprocess.DEVNULL, "text": True, **more}
        env = {**self.environment, **(environment or {})}
        popen = subprocess.Popen(self._namespace.enter(["env", f"--chdir={self.home}", *command]), env=env, **more)
        self._popens.append(popen)
        return popen

    def run(
        self, command: Sequence[str], *, timeout_s: float = _PATIENCE_S, environment: Mapping[str, str] | None = None
    ) -> Output:
        """Run a command on this host to its end; what it leaves running goes on.

        Raises AssertionError with its output where it takes longer.
        """
        log = self.home / f"command-{next(self._numbers)}.log"  # a pipe would wait for daemons, which inherit it
        with log.open("w") as out:
            popen = self.popen(command, environment=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            code = popen.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            popen.kill()
            raise AssertionError(f"{shlex.join(command)} took over {timeout_s} s:\n{log.read_text()}") from None
        return Output(code, log.read_text())

    def check(self, command: Sequence[str], **more: Any) -> str:
        """Run a command and return its output. Raises AssertionError where it fails."""
        done = self.run(command, **more)
        assert done.returncode == 0, f"{shlex.join(command)} on {self.name} failed:\n{done.text}"
        return done.text

    def start_ray(self, head: Host | None = None, *, environment: Mapping[str, str] | None = None) -> None:
        """Start Ray on this host: a cluster's head, or a node of the cluster that `head` has started."""
        where = [f"--address={head.address}:{RAY_PORT}"] if head else ["--head", f"--port={RAY_PORT}"]
        more = ["--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats"]
        more += [] if head else ["--include-dashboard=false"]
        self.check(
            [_RAY, "start", *where, f"--node-ip-address={self.address}", *more], timeout_s=90, environment=environment
        )

    def revdist(self, *arguments: str | os.PathLike[str], timeout_s: float = 100) -> Output:
        """Run the command `revdist` on this host."""
        return self.run([*REVDIST, *map(str, arguments)], timeout_s=timeout_s)

    def processes(self) -> list[psutil.Process]:
        """What runs on this host, seen from outside; nothing while it is off."""
        return self._namespace.processes() if self.is_on else []

    def cut_link(self) -> None:
        """Pull the network cable."""
        self._wire.do("ip", "link", "set", self._port, "down")

    def heal_link(self) -> None:
        """Put the network cable back."""
        self._wire.do("ip", "link", "set", self._port, "up")

    def power_off(self) -> None:
        """Cut the power: nobody says good-bye."""
        if not self.is_on:
            return
        self.is_on = False
        self.cut_link()
        self._namespace.kill()
        for popen in self._popens:
            popen.kill()
            popen.wait()
        self._popens.clear()
        with contextlib.suppress(subprocess.CalledProcessError):  # the kernel may have removed it by now
            self._wire.do("ip", "link", "delete", self._port, stderr=subprocess.DEVNULL)

    def power_on(self) -> None:
        """Boot again, with the name, the address and the disk that it had; memory and /tmp/ray are empty."""
        assert not self.is_on
        self._namespace = self._boot()
        self._connect()
        self.is_on = True

    def _boot(self) -> _Namespace:
        return _Namespace(
            _BOOT.format(
                hosts=shlex.quote(str(self._hosts_file)),
                resolver=shlex.quote(str(self.home / "resolv.conf")),
                name=self.name,
                python=shlex.quote(sys.executable),
                wait=shlex.quote(_WAIT_FOR_THE_END),
            )
        )

    def _connect(self) -> None:
        wire, inside = self._wire, self._namespace
        wire.do(
            "ip",
            "link",
            "add",
            "name",
            self._port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(inside.first_pid),
        )
        wire.do("ip", "link", "set", self._port, "master", "bridge")
        wire.do("ip", "link", "set", self._port, "up")
        inside.do("ip", "link", "set", "lo", "up")
        inside.do("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        inside.do("ip", "link", "set", "eth0", "up")


@final
class Network:
    """A bridge and the hosts on it; leaving the context switches all of them off."""

    def __init__(self, folder: Path) -> None:
        """folder: where the homes of the hosts lie."""
        self._folder = folder
        self._wire: _Namespace | None = None
        self._numbers = itertools.count(1)
        self.hosts: list[Host] = []

    def __enter__(self) -> Network:
        self._wire = _Namespace(f"echo booted; exec {shlex.quote(sys.executable)} -c {shlex.quote(_WAIT_FOR_THE_END)}")
        self._wire.do("ip", "link", "add", "name", "bridge", "type", "bridge")
        self._wire.do("ip", "link", "set", "bridge", "up")
        self._hosts_file.write_text("127.0.0.1 localhost\n")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.power_off()
        if self._wire is not None:
            self._wire.kill()

    def add(self, *, cluster_token: str = "of-a-test-" * 4) -> Host:
        """Another host, booted, with the cluster's token in its home and known by name to all."""
        assert self._wire is not None, "enter the network first"
        number = next(self._numbers)
        name, address = f"host-{number}", f"{SUBNET}.{number}"
        with self._hosts_file.open("a") as hosts:
            hosts.write(f"{address} {name}\n")
        host = Host(name, address, self._folder, self._wire, self._hosts_file)
        self.hosts.append(host)
        token = host.home / ".ray" / "auth_token"
        token.parent.mkdir()
        token.write_text(cluster_token)
        token.chmod(0o600)
        return host

    @property
    def _hosts_file(self) -> Path:
        return self._folder / "hosts"


@final
class _Namespace:
    """Namespaces that last as long as their first process, which lasts as long as its input is open."""

    def __init__(self, boot: str) -> None:
        self._popen = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", boot],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._popen.stdout is not None
        word = self._popen.stdout.readline()
        assert word == "booted\n", f"the namespaces were not made: {word}"
        (first,) = psutil.Process(self._popen.pid).children()
        self.first_pid = first.pid

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command that runs a command inside."""
        return ["nsenter", f"--target={self.first_pid}", "--net", "--pid", "--mount", "--uts", "--", *command]

    def do(self, *command: str, **more: Any) -> None:
        """Run a command on the network inside, with the machine's own pids and files. It must succeed."""
        subprocess.run(["nsenter", f"--target={self.first_pid}", "--net", "--", *command], check=True, **more)

    def processes(self) -> list[psutil.Process]:
        own = os.stat(f"/proc/{self.first_pid}/ns/pid").st_ino
        return [process for process in psutil.process_iter() if _namespace_of(process.pid) == own]

    def kill(self) -> None:
        """End the first process, and with it, at once, all others."""
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.first_pid).kill()
        self._popen.wait(timeout=_PATIENCE_S)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()


def _namespace_of(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return None


@contextlib.contextmanager
def three_with_ray(
    folder: Path, *, head_settings: Callable[[Host], Mapping[str, str]] = lambda _: {}
) -> Iterator[Network]:
    """Three hosts with Ray on them, the head first. head_settings: environment of the head's Ray."""
    with Network(folder) as network:
        head, *others = [network.add() for _ in range(3)]
        head.start_ray(environment=head_settings(head))
        for host in others:
            host.start_ray(head)
        yield network

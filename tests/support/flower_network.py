"""A Flower deployment on loopback for tests: one SuperLink and its SuperNodes, over TLS.

The processes are those that a deployment starts, taken from the environment of this interpreter,
and every file that they write lies in one folder. Needs ``flwr`` (made for 1.41) and ``psutil``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

Scalar = bool | int | float | str

HOST = "127.0.0.1"
# A loaded machine takes several times the usual three seconds or so.
START_TIMEOUT = 60.0
# Two of Flower's intervals between heartbeats, which cannot be set.
HEARTBEAT_LIMIT = 60.0

# What a SuperNode says whose key SuperLink does not know, or that it believes online already.
REFUSED = "[code: 2004] Failed to activate SuperNode."

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Whatever else would call home meets a closed port instead.
    "FLWR_SUPERGRID_API_URL": f"https://{HOST}:9/v1",
    "NO_PROXY": f"{HOST},localhost",
    "no_proxy": f"{HOST},localhost",
    "PYTHONUNBUFFERED": "1",
    # Instead of every second; the messages themselves are fetched every three, unalterably.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}


# Certificates and keys.


@dataclass(frozen=True)
class Certificates:
    """A certificate authority and a server certificate for loopback that it signed."""

    authority: Path
    server: Path
    server_key: Path


def write_certificates(folder: Path) -> Certificates:
    folder.mkdir(parents=True, exist_ok=True)
    paths = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    authority_key = ec.generate_private_key(ec.SECP256R1())
    server_key = ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name.from_rfc4514_string("CN=Test authority")
    names = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address(HOST))]

    authority = (
        _certificate(authority_name, authority_name, authority_key, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    server = (
        _certificate(
            x509.Name.from_rfc4514_string("CN=localhost"), authority_name, server_key, authority_key
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    for path, certificate in ((paths.authority, authority), (paths.server, server)):
        signed = certificate.sign(authority_key, hashes.SHA256())
        path.write_bytes(signed.public_bytes(Encoding.PEM))
    _write_secret(
        paths.server_key,
        server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
    return paths


def write_key_pair(private: Path) -> Path:
    """A SuperNode's key pair, its public half beside it as ``.pub``."""
    private.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _public_half(private).write_bytes(public)
    return private


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    # The two identifiers: Python 3.13 verifies strictly and refuses certificates without them.
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_id, critical=False)
    )


def _key_usage(**allowed: bool) -> x509.KeyUsage:
    uses = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{use: allowed.get(use, False) for use in uses})


def _write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _public_half(private: Path) -> Path:
    return private.with_name(private.name + ".pub")


# Processes.


@dataclass
class Member:
    """A SuperLink or SuperNode process with all that it starts."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    groups: set[int] = field(default_factory=set)

    @property
    def output(self) -> str:
        """What it wrote since this start; a restarted member goes on in the same file."""
        with open(self.log, "rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")

    def await_start(self, started: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not started():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start\n{_tail(self.output)}")
            time.sleep(0.1)

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def note_groups(self) -> list[psutil.Process]:
        """Notes the process groups of what it started.

        SuperLink's SuperExec leads a group of its own, which also holds the ServerApp and outlives
        SuperLink; everything else stays in the group of the member.
        """
        descendants = self.descendants()
        for descendant in descendants:
            with suppress(ProcessLookupError):
                self.groups.add(os.getpgid(descendant.pid))
        return descendants

    def kill(self) -> None:
        """Kills it and all that it started at once, as when the machine is switched off."""
        # A stopped process starts no child between the look and the kill.
        self._signal(signal.SIGSTOP)
        descendants = self.note_groups()
        self._signal(signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 10
        while any(map(_alive, descendants)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} left processes behind: {descendants}")
            time.sleep(0.01)
        self.groups.clear()

    def _signal(self, number: signal.Signals) -> None:
        for group in self.groups:
            with suppress(ProcessLookupError):
                os.killpg(group, number)


def free_port() -> int:
    """A free port below those that the kernel gives to outgoing connections.

    So that nothing takes the port of a SuperLink between its end and its next start.
    """
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind((HOST, port))
            return port
    raise RuntimeError("no free port")


# The network.


class FlowerNetwork:
    """A SuperLink that knows ``nodes`` SuperNodes by their keys, all running while it is entered.

    Node ``i`` gets ``partition-id`` and ``num-partitions``, and what ``node_config(i)`` adds, as
    its ``context.node_config``. ``environment`` is added to that of every process, apps included.
    ``warm`` nodes are those of ``fwdllm federate node`` instead of Flower's own. Without
    ``registered`` SuperLink takes in any node. ``in_memory``, as is its default, SuperLink has no
    database, and when it ends everything is lost. Nodes connect to ``node_port``, where a proxy may
    listen.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 3,
        *,
        node_config: Callable[[int], Mapping[str, Scalar]] | None = None,
        environment: Mapping[str, str] | None = None,
        warm: bool = False,
        registered: bool = True,
        in_memory: bool = False,
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = nodes
        self.port = self.node_port = free_port()
        self.database = None if in_memory else self.folder / "superlink.db"
        self.certificates = write_certificates(self.folder / "tls")
        self.node_ids: list[int] = []
        self._node_config = node_config
        self._warm = warm
        self._registered = registered
        # Flower looks for its own programs on the path. Settings of the machine stay out.
        scripts = str(Path(sys.executable).parent)
        outer = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        path = os.pathsep.join([scripts, outer.get("PATH", os.defpath)])
        self._environment = {**outer, "PATH": path, **ENVIRONMENT, **(environment or {})}
        self._scripts = Path(scripts)
        self._members: dict[str, Member] = {}
        self.keys = [write_key_pair(self.folder / "keys" / f"node-{i}") for i in range(nodes)]

    # Start and end.

    def __enter__(self) -> FlowerNetwork:
        try:
            self._write_cli_config()
            self.start_superlink()
            with ThreadPoolExecutor(max_workers=4) as pool:
                self.node_ids = list(pool.map(self._register, self.keys))
            for i in range(self.nodes):
                self._spawn_node(i)
            for i in range(self.nodes):
                self._await_online(i)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for name in list(self._members):
            self._members.pop(name).kill()

    # SuperLink.

    def start_superlink(self) -> None:
        """Starts SuperLink on the port and database that it had, if it ran before."""
        command = ["--host", HOST, "--port", self.port]
        command += ["--ssl-ca-certfile", self.certificates.authority]
        command += ["--ssl-certfile", self.certificates.server]
        command += ["--ssl-keyfile", self.certificates.server_key]
        command += ["--database", self.database] if self.database else []
        command += ["--enable-supernode-auth"] if self._registered else []
        command += ["--disable-runtime-dependency-installation"]
        superlink = self._spawn("superlink", ["flower-superlink", *command])
        superlink.await_start(lambda: _listens(self.port))
        # SuperExec runs by now: should SuperLink crash, close() still finds it.
        superlink.note_groups()

    @property
    def superlink_pid(self) -> int:
        return self._members["superlink"].process.pid

    def kill_superlink(self) -> None:
        """Kills SuperLink, and the ServerApp with it."""
        self._members.pop("superlink").kill()

    def kill_server_app(self, timeout: float = 30) -> None:
        """Kills the ServerApp process alone, once it runs."""
        superlink = self._members["superlink"]
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            apps = [p for p in superlink.descendants() if _runs(p, "flwr-serverapp")]
            for app in apps:
                app.kill()
            if apps:
                return
            time.sleep(0.1)
        raise TimeoutError(f"no ServerApp runs\n{self._tails()}")

    # SuperNodes.

    def start_node(self, i: int) -> None:
        """Starts node ``i`` with its key, and waits until SuperLink has taken it in.

        SuperLink refuses a node that it believes online, as it does a killed one for a minute, and
        the SuperNode then ends; so this starts it again, as a service manager would.
        """
        deadline = time.monotonic() + HEARTBEAT_LIMIT + START_TIMEOUT
        while True:
            node = self._spawn_node(i)
            try:
                return self._await_online(i)
            except RuntimeError:
                if REFUSED not in node.output or time.monotonic() > deadline:
                    raise
            self.kill_node(i)
            time.sleep(3)

    def workers(self, i: int) -> list[psutil.Process]:
        """The processes that compute for warm node ``i``: one, once it has had a message."""
        started = self._members[f"node-{i}"].descendants()
        return [p for p in started if _alive(p) and "spawn_main" in " ".join(p.cmdline())]

    def kill_node(self, i: int) -> None:
        """Kills node ``i``, its ClientApp included."""
        self._members.pop(f"node-{i}").kill()

    def stop_node(self, i: int) -> None:
        """Ends node ``i`` as its owner would, so that SuperLink knows and takes it in again."""
        node = self._members.pop(f"node-{i}")
        node.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            node.process.wait(timeout=10)
        node.kill()

    def lapse_node(self, i: int) -> None:
        """Lets SuperLink find a killed node offline now, where it would a minute after the kill.

        Moves the node's last heartbeat into the past in SuperLink's database.
        """
        sql = "UPDATE node SET online_until = 0 WHERE node_id = ?"
        with closing(sqlite3.connect(self.database, timeout=10)) as database, database:
            assert database.execute(sql, [_signed(self.node_ids[i])]).rowcount == 1

    def start_stranger(
        self,
        name: str,
        *,
        key: Path | None = None,
        authority: Path | None = None,
        arguments: Sequence[object] = (),
    ) -> Member:
        """Starts a SuperNode with any key and certificate authority, and waits for nothing.

        Without an authority it does not use TLS.
        """
        return self._spawn_supernode(name, {}, key, authority, arguments)

    # Runs.

    def run(self, app: Path, run_config: Mapping[str, Scalar] | None = None) -> int:
        """Submits the Flower app in a folder; the values override those of its pyproject.toml."""
        arguments: list[object] = ["run", app, "test"]
        if run_config:
            file = self._write_toml(self.folder / "run-config.toml", run_config)
            arguments += ["--run-config", file]
        return int(self.flwr(*arguments)["run-id"])

    def status(self, run_id: int) -> str:
        """``pending``, ``starting``, ``running``, or ``finished:`` with how."""
        return str(self.flwr("list", "test", "--run-id", run_id)["runs"][0]["status"])

    def wait(self, run_id: int, timeout: float) -> str:
        """Waits until a run is over and returns its status."""
        deadline = time.monotonic() + timeout
        while not self.finished(run_id):
            if time.monotonic() > deadline:
                said = f"ServerApp:\n{_tail(self.server_log(run_id))}\n{self._tails()}"
                status = self.status(run_id)
                raise TimeoutError(f"run {run_id} is {status} after {timeout} s\n{said}")
            time.sleep(0.2 if self.database else 3)
        return self.status(run_id)

    def finished(self, run_id: int) -> bool:
        """Whether a run is over, from SuperLink's database, if it has one.

        Asking ``flwr`` every second would keep a processor busy with importing it.
        """
        if self.database is None:
            return self.status(run_id).startswith("finished")
        sql = """
            SELECT finished_at FROM run JOIN task ON task_id = primary_task_id WHERE run.run_id = ?
        """
        with closing(sqlite3.connect(self.database, timeout=10)) as database:
            [finished] = database.execute(sql, [_signed(run_id)]).fetchone()
        return finished is not None

    def logs(self) -> dict[str, str]:
        """What each member has written so far, by name; a ClientApp writes in its SuperNode's."""
        logs = sorted(self.folder.glob("*.log"))
        return {log.stem: log.read_text(encoding="utf-8", errors="replace") for log in logs}

    def server_log(self, run_id: int) -> str:
        """What the ServerApp of a run has written; it goes to SuperLink's database alone."""
        return self._flwr("log", run_id, "test", "--show").stdout

    def flwr(self, *arguments: object) -> Any:
        """The answer of a ``flwr`` command; this SuperLink's name in it is ``test``."""
        done = self._flwr(*arguments, "--format", "json")
        answer = json.loads(done.stdout)
        if not answer["success"]:
            raise RuntimeError(f"{done.args}: {done.stdout}{done.stderr}")
        return answer

    # Inside.

    def _write_cli_config(self) -> None:
        connection: dict[str, Scalar] = {
            "address": f"{HOST}:{self.port}",
            "root-certificates": str(self.certificates.authority),
            "insecure": False,
        }
        config = self.folder / "cli" / "config.toml"
        config.parent.mkdir(exist_ok=True)
        self._write_toml(config, connection, "[superlink.test]\n")

    def _flwr(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self._scripts / "flwr"), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**self._environment, "FLWR_HOME": str(self.folder / "cli")},
            cwd=self.folder,
            timeout=START_TIMEOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{done.args}: {done.stdout}{done.stderr}")
        return done

    def _register(self, key: Path) -> int:
        answer = self.flwr("supernode", "register", _public_half(key), "test")
        return int(answer["node-id"])

    def _spawn_node(self, i: int) -> Member:
        extra = self._node_config(i) if self._node_config else {}
        if self._warm:
            return self._spawn_warm(f"node-{i}", extra, self.keys[i])
        config: dict[str, Scalar] = {"partition-id": i, "num-partitions": self.nodes, **extra}
        return self._spawn_supernode(
            f"node-{i}", config, self.keys[i], self.certificates.authority, arguments=()
        )

    def _spawn_warm(self, name: str, config: Mapping[str, Scalar], key: Path) -> Member:
        command: list[object] = [sys.executable, "-m", "fwdllm", "federate", "node"]
        command += ["--superlink", f"{HOST}:{self.node_port}"]
        command += ["--root-certificates", self.certificates.authority]
        command += ["--auth-supernode-private-key", key]
        for option, value in config.items():
            command += [f"--{option}", value]
        return self._spawn(name, command)

    def _spawn_supernode(
        self,
        name: str,
        config: Mapping[str, Scalar],
        key: Path | None,
        authority: Path | None,
        arguments: Sequence[object],
    ) -> Member:
        command = ["--superlink", f"{HOST}:{self.node_port}"]
        command += ["--host", HOST, "--port", free_port()]
        command += ["--root-certificates", authority] if authority else ["--insecure"]
        command += ["--auth-supernode-private-key", key] if key else []
        if config:
            file = self._write_toml(self.folder / f"{name}.toml", config)
            command += ["--node-config", file]
        return self._spawn(name, ["flower-supernode", *command, *arguments])

    def _await_online(self, i: int) -> None:
        node = self._members[f"node-{i}"]
        node.await_start(lambda: f"SuperNode ID: {self.node_ids[i]}" in node.output)

    def _spawn(self, name: str, command: Sequence[object]) -> Member:
        if name in self._members:
            raise ValueError(f"{name} runs already")
        # Each has a home and a working folder of its own, as on machines of their own.
        home = self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.log"
        with open(path, "ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                [str(self._scripts / str(command[0])), *map(str, command[1:])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=home,
                env={**self._environment, "FLWR_HOME": str(home)},
                start_new_session=True,
            )
        self._members[name] = Member(name, process, path, start, {process.pid})
        return self._members[name]

    def _write_toml(self, path: Path, values: Mapping[str, Scalar], head: str = "") -> Path:
        # JSON writes these types as TOML does.
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
        path.write_text(head + "".join(lines), encoding="utf-8")
        return path

    def _tails(self) -> str:
        return "\n".join(f"{name}:\n{_tail(text)}" for name, text in self.logs().items())


def _signed(id: int) -> int:
    """As SQLite, which has no unsigned 64-bit numbers, keeps an id."""
    return id - (1 << 64) * (id >> 63)


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def _alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that is dead may wait for seconds to be collected."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _runs(process: psutil.Process, program: str) -> bool:
    try:
        # After the interpreter comes the script; a dead process has no command line.
        return bool(Path(process.cmdline()[1]).name == program)
    except (psutil.Error, IndexError):
        return False


def _tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])

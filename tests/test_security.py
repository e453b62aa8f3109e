"""Who may reach a run, and what a file from a stranger can do: see docs/security.md."""

import contextlib
import functools
import ipaddress
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
import ray._private.worker
import yaml

from decentral.config import load
from decentral.engines.ray import RayEngine, _read_token_again, _token
from decentral.engines.worker import Group, Surroundings, Worker
from decentral.experiment import build

pytestmark = pytest.mark.usefixtures("alone")  # tokens are of the process

TOKEN_NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def no_token(tmp_path):
    """A user who has set nothing of Ray's; an empty home directory, which is given."""
    with pytest.MonkeyPatch.context() as environment:
        for name in TOKEN_NAMES:
            environment.delenv(name, raising=False)
        environment.setenv("HOME", str(tmp_path))
        yield tmp_path
    _read_token_again()  # Ray sets a mode itself, where a home directory has a token


def token_settings() -> dict[str, str]:
    return {name: os.environ[name] for name in TOKEN_NAMES if name in os.environ}


# Tokens


def test_a_cluster_of_ours_has_a_fresh_token_in_the_environment_while_it_lives(no_token):
    tokens = []
    for _ in range(2):
        with _token():
            settings = token_settings()
            assert settings.pop("RAY_AUTH_MODE") == "token"
            tokens.append(settings.pop("RAY_AUTH_TOKEN"))
            assert settings == {}
            assert mode_in_force() == "token"
        assert token_settings() == {}
        assert mode_in_force() == "disabled"
    assert len(set(tokens)) == 2
    assert all(len(token) == 64 for token in tokens)  # 256 bits in hexadecimal digits


def mode_in_force() -> str:
    """What Ray in this process has read, which need not be what the environment says."""
    from ray._private.authentication import authentication_utils as ray_authentication

    return "token" if ray_authentication.is_token_auth_enabled() else "disabled"


@pytest.mark.parametrize(
    "settings",
    [
        {"RAY_AUTH_TOKEN": "5" * 64},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64},
        {"RAY_AUTH_TOKEN_PATH": "/home/user/token"},
    ],
)
def test_a_token_of_the_users_is_used(no_token, monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with _token():
        assert token_settings() == {"RAY_AUTH_MODE": "token"} | settings
    assert token_settings() == settings


def test_a_user_may_turn_tokens_off(no_token, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with _token():
        assert token_settings() == {"RAY_AUTH_MODE": "disabled"}


def test_the_environment_is_restored_after_a_failure(no_token, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ZeroDivisionError), _token():
        raise ZeroDivisionError
    assert token_settings() == {"RAY_AUTH_MODE": "token"}


# Clusters

JOIN = """
import sys, ray
ray.init(sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
print(ray.cluster_resources()["CPU"])
"""


def joins(address: str, settings: dict[str, str]) -> bool:
    """Whether a process with these of Ray's settings can join the cluster at `address`."""
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env={k: v for k, v in os.environ.items() if k not in TOKEN_NAMES} | settings | QUICKLY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        assert "Failed to connect" in done.stderr or "AuthenticationError" in done.stderr
    return done.returncode == 0


QUICKLY = {
    "RAY_NUM_REDIS_GET_RETRIES": "2",  # attempts to join, a second each
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray looks for 127.0.0.1 at the host's address
}


@contextlib.contextmanager
def engine(quick, **overrides) -> Iterator[RayEngine]:
    made = RayEngine(build(load({**quick, "workers": 2, "engine": "ray"}, overrides)))
    try:
        yield made
    finally:
        made.close()


def listening(process: psutil.Process) -> list[str]:
    """Addresses at which a process listens."""
    connections = process.net_connections("inet")
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]


def own_addresses(worker: Worker) -> list[str]:
    return listening(psutil.Process())


@pytest.mark.slow
def test_a_run_of_our_own_is_closed_to_others(no_token, quick):
    """No process without the token can join, and none of another machine can even ask."""
    tokens = []
    me = psutil.Process()
    others = me.children(recursive=True)  # that earlier tests have left, for later ones
    for turn in range(2):  # the second finds what Ray keeps in this process of the first
        with engine(quick) as made:
            assert made.step_seconds().shape == (2,)
            tokens.append(os.environ["RAY_AUTH_TOKEN"])
            address = ray.get_runtime_context().gcs_address
            if turn == 0:
                wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
                asked = [token_settings(), {}, {"RAY_AUTH_MODE": "disabled"}, wrong]
                with ThreadPoolExecutor() as strangers:
                    join = functools.partial(joins, address)
                    assert list(strangers.map(join, asked)) == [True, False, False, False]
                everywhere = [ip for ips in made.ask(own_addresses) for ip in ips]
                for process in {me, *me.children(recursive=True)}.difference(others):
                    everywhere += listening(process)
                assert len(everywhere) > 4  # of Ray's own processes and of the workers
                for ip in everywhere:
                    assert ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback
                node = ray._private.worker._global_node
                assert node is not None
                session = node.get_session_dir_path()
                assert not holds(Path(session), tokens[0])
        assert token_settings() == {}
    assert tokens[0] != tokens[1]
    assert not list(no_token.rglob("*token*"))


def holds(folder: Path, text: str) -> bool:
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    assert files
    return any(text.encode() in p.read_bytes() for p in files)


@pytest.mark.slow
def test_a_run_joins_a_cluster_with_the_users_token_and_says_so_where_it_is_missing(
    no_token, quick, monkeypatch
):
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "6" * 64}
    with cluster(settings) as address:
        for name, value in QUICKLY.items():
            monkeypatch.setenv(name, value)
        with ThreadPoolExecutor() as at_once:
            run_with = functools.partial(run, quick, no_token, address)
            done, tokenless, joined = at_once.map(
                run_with, [{}, {"RAY_AUTH_MODE": "token"}, settings], ["a", "b", "c"]
            )
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert f"\nerror: ray.address: cannot join a Ray cluster at '{address}'" in done.stderr
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr
        assert "Traceback" not in done.stderr
        assert tokenless.returncode == 2, tokenless.stderr
        assert "ray.address: cannot join" in tokenless.stderr
        assert joined.returncode == 0, joined.stderr


def run(quick, folder: Path, address: str, settings: dict[str, str], out: str):
    (folder / "config.yaml").write_text(yaml.safe_dump(quick))
    words = ("steps=6", "workers=2", "engine=ray", f"ray.address={address}")
    return subprocess.run(
        [sys.executable, "-m", "decentral", "run", "config.yaml", *words, "--out", out],
        env=os.environ | settings,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


CLUSTER = """
import ray, sys
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=10**8)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def cluster(settings: dict[str, str]) -> Iterator[str]:
    """A cluster of another process with these settings; its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=os.environ | settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:  # waits, after it has closed standard input, on which the cluster ends
        assert process.stdout is not None
        yield process.stdout.readline().strip()


# Interfaces


def own_address() -> str:
    """An IPv4 address of this machine, not of its loopback interface if it has another."""
    addresses = [
        a.address
        for interface in psutil.net_if_addrs().values()
        for a in interface
        if a.family == socket.AF_INET
    ]
    return max(addresses, key=lambda address: not ipaddress.ip_address(address).is_loopback)


WORKER = Worker()  # of a process of the test below


def build_worker(config, rank):
    WORKER.build(config, None, rank, Surroundings.here())


def call(method, *arguments):
    return getattr(WORKER, method)(*arguments)


def worker_listens():
    return own_addresses(WORKER)


def test_workers_listen_on_the_address_of_their_node_alone(quick):
    address = own_address()
    config = load(quick, {"workers": 2})
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in range(2)
        ]
        for call_of in [p.submit(build_worker, config, i) for i, p in enumerate(processes)]:
            call_of.result()
        port = processes[0].submit(call, "listen", address).result()
        assert processes[0].submit(worker_listens).result() == [address]
        with socket.create_connection((address, port), timeout=10):
            pass
        if address != "127.0.0.1":
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=10)
        group = Group((0, 1), build(config).topology)
        connected = [p.submit(call, "connect", address, port, address, group) for p in processes]
        for call_of in connected:
            call_of.result()
        for process in processes:
            listens = process.submit(worker_listens).result()
            assert set(listens) == {address}
        for call_of in [p.submit(call, "leave") for p in processes]:
            call_of.result()

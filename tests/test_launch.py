"""What is in launch/ starts clusters: the steps of its README are run on hosts in network
namespaces, the SLURM script by SLURM itself, and each file is held to the schema of who reads it.
"""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import jsonschema
import numpy as np
import pandas
import pytest
import yaml

import decentral
from decentral.config import dump, load

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
HERE = str(Path(sys.executable).parent)  # of `ray` and `decentral`

NO_HOSTS = hosts.why_not()
on_hosts = pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))


def shell_blocks(section: str = "") -> list[str]:
    """The bash blocks of the README, or of one section of it."""
    text = README if not section else README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"^( *)```bash\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def block(section: str, containing: str) -> str:
    (found,) = [b for b in shell_blocks(section) if containing in b]
    return found


def tool(name: str) -> str:
    """The path of a program; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def check_records(folder: Path, config: decentral.config.Config) -> None:
    """The run in `folder` is done, and has the simulator's records."""
    launched = pandas.read_json(folder / "metrics.jsonl", lines=True)
    simulated = decentral.run(config.model_dump(exclude_none=True), engine="sim").metrics
    assert list(launched.step) == list(simulated.step)
    assert list(launched.bytes_sent) == list(simulated.bytes_sent)
    for column in ("loss", "consensus_distance", "eval_loss"):
        a, b = simulated[column].dropna(), launched[column].dropna()
        np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=column)
    assert '"status": "done"' in (folder / "summary.json").read_text()


class Machines:
    """Hosts that are machines: each has a name, a home and a folder for Ray's files of its own.

    `shared` is on all of them. `environment` is that of a user there, who has decentral and Ray.
    """

    def __init__(self, made: hosts.Hosts, shared: Path):
        self.hosts = made
        self.shared = shared
        self.names = [f"node{i}" for i in range(len(made.names))]
        self.environment = {
            "PATH": os.pathsep.join([HERE, os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]),
            "HOME": str(shared / "home"),
            "RAY_TMPDIR": str(shared / "local"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": str(os.nice(0)),  # else 15: workers would yield to all others
            "OMP_NUM_THREADS": "1",
        }
        for folder in ("home", "local"):
            (shared / folder).mkdir()
            for name in self.names:
                (shared / f"{folder}-{name}").mkdir()

    def command(self, i: int, script: str) -> list[str]:
        """What runs a bash script on machine i. The mounts are seen by the script alone."""
        own = [f"hostname {self.names[i]}"]
        for folder in ("home", "local"):
            mounted = self.shared / folder
            own.append(f"mount --bind {mounted}-{self.names[i]} {mounted}")
        return ["unshare", "--uts", "bash", "-ec", "\n".join([*own, f"cd {ROOT}", script])]

    def run(self, i: int, script: str, timeout_s: float = 150) -> str:
        done = self.hosts.run(
            i, *self.command(i, script), timeout_s=timeout_s, environment=self.environment
        )
        return done.stdout


@contextlib.contextmanager
def machines(k: int) -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="dc", dir="/tmp"))  # Ray's socket paths must be short
    try:
        with hosts.hosts(k) as made:
            yield Machines(made, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def config(quick):
    """A run of three workers, in the simulator's records or on a cluster, as a file too."""
    return load(quick, {"engine": "ray", "workers": 3, "topology": {"name": "ring"}})


# By hand, and `ray job submit`


@pytest.mark.slow
@on_hosts
def test_the_readmes_steps_start_a_cluster_that_takes_a_run(config):
    pytest.importorskip("aiohttp", reason="ray job submit needs decentral[cluster]")
    with machines(3) as made:
        (made.shared / "config.yaml").write_text(dump(config))
        made.run(0, block("By hand", "get-auth-token"))
        token = made.shared / "home-node0/.ray/auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        for i in (1, 2):
            folder = made.shared / f"home-node{i}/.ray"
            folder.mkdir()
            shutil.copy(token, folder)
        made.run(0, block("By hand", "--head"))
        for i in (1, 2):
            made.run(i, f"FIRST={made.hosts.addresses[0]}\n" + block("By hand", "--address"))

        here = f"cp {made.shared}/config.yaml .\nexport RAY_AUTH_MODE=token\n"
        submit = block("Run", "job submit")
        address, submitted = submit.splitlines()
        submitted = submitted.replace("/shared", str(made.shared))
        submitted = submitted.replace("configs/quickstart.yaml", "config.yaml")
        folder = f"mkdir {made.shared}/project\ncd {made.shared}/project\n"
        printed = made.run(0, f"{folder}{here}{address}\n{submitted}")
        assert "3 workers on 3 nodes of the Ray cluster" in printed
        check_records(made.shared / "runs/first", config)

        followed = made.run(0, f"export RAY_AUTH_MODE=token\n{address}\n{block('Run', 'logs')}")
        assert "Job 'first' succeeded" in followed
        assert f"step {config.steps}/{config.steps}" in followed

        stranger = f"{address}\nHOME=/nowhere\n"
        with pytest.raises(subprocess.CalledProcessError) as refused:
            made.run(0, f"{stranger}ray job list")
        assert "Missing authentication token" in refused.value.stderr
        with pytest.raises(subprocess.CalledProcessError) as refused:
            made.run(0, f"{stranger}export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong\nray job list")
        assert "Invalid authentication token" in refused.value.stderr


# SLURM

SLURM_TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")


@contextlib.contextmanager
def slurm(k: int) -> Iterator[Machines]:
    """A SLURM cluster of k machines; `sbatch` works on the first."""
    with machines(k) as made, contextlib.ExitStack() as stack:
        folder = made.shared
        folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        for name in ("state", *(f"spool-{name}" for name in made.names)):
            (folder / name).mkdir()
        # The namespaces have no cgroups; version 1 is content with none.
        (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}\n")
        nodes = zip(made.names, made.hosts.addresses, strict=True)
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                folder=folder,
                head=made.hosts.addresses[0],
                nodes="\n".join(
                    f"NodeName={name} NodeAddr={address} CPUs=2 RealMemory=1000"
                    for name, address in nodes
                ),
            )
        )
        made.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        log = stack.enter_context((folder / "daemons.log").open("w"))

        def daemon(i: int, command: str) -> None:
            script = made.command(i, f"exec {command}")
            process = subprocess.Popen(
                ["ip", "netns", "exec", made.hosts.names[i], *script],
                stdout=log,
                stderr=log,
                env=os.environ | made.environment,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)

        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        options = " ".join(f"--{option}={folder}/{file}" for option, file in files.items())
        daemon(0, f"munged --foreground --force {options}")
        daemon(0, "slurmctld -D")
        for i, name in enumerate(made.names):
            daemon(i, f"slurmd -D -N {name}")
        idle = f"until [[ $(sinfo -h -t idle -o %D) == {k} ]]; do sleep 0.5; done"
        try:
            made.run(0, idle, timeout_s=60)
            yield made
        except BaseException:
            print((folder / "daemons.log").read_text())
            raise
        finally:
            for process in made.hosts.processes():  # jobs, and then the daemons
                if "slurm" not in process.name() and "munge" not in process.name():
                    with contextlib.suppress(Exception):
                        process.kill()


SLURM_CONF = """
ClusterName=test
SlurmctldHost=node0({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def sbatch(made: Machines, command: str) -> str:
    """Submit the README's command for `command`, with its knobs; what the job printed, at its end.
    Raises CalledProcessError if the job failed."""
    log = made.shared / "job.log"
    log.unlink(missing_ok=True)
    knobs = f"VENV={made.shared}/venv RUNS={made.shared}/runs RAY_TMPDIR={made.shared}/local/ray"
    command = re.sub("^sbatch", f"sbatch --wait --output={log}", command)
    try:
        made.run(0, f"{knobs} {command}")
    finally:
        print(log.read_text() if log.exists() else "the job did not start")
    return log.read_text()


@pytest.fixture
def slurm_cluster():
    for name in SLURM_TOOLS:
        tool(name)
    with slurm(3) as made:
        activate = made.shared / "venv/bin/activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(f"PATH={HERE}:$PATH\n")
        yield made


@pytest.mark.slow
@on_hosts
def test_slurm_runs_the_script_to_its_results(config, slurm_cluster):
    made = slurm_cluster
    (made.shared / "config.yaml").write_text(dump(config))
    command = block("SLURM", "sbatch --nodes=3 launch/slurm.sbatch configs")
    command = command.replace("configs/quickstart.yaml", f"{made.shared}/config.yaml")
    printed = sbatch(made, command)
    assert "3 workers on 3 nodes of the Ray cluster" in printed
    (folder,) = (made.shared / "runs").iterdir()
    assert re.fullmatch(r"decentral-\d+", folder.name)
    check_records(folder, config)
    left = [p.cmdline() for p in made.hosts.processes()]
    assert not [words for words in left if "ray" in " ".join(words)], left
    assert not list(made.shared.glob("local-*/ray"))
    with pytest.raises(subprocess.CalledProcessError):  # the job fails with the run
        sbatch(made, f"{command.strip()} steps=none")


@pytest.mark.slow
@on_hosts
def test_a_slurm_job_that_runs_out_of_time_goes_on_from_its_checkpoint(config, slurm_cluster):
    made = slurm_cluster
    config = config.model_copy(update={"steps": 100_000})
    (made.shared / "config.yaml").write_text(dump(config))
    log = made.shared / "first.log"
    knobs = f"VENV={made.shared}/venv RUNS={made.shared}/runs RAY_TMPDIR={made.shared}/local/ray"
    sent = made.run(
        0,
        f"{knobs} sbatch --parsable --output={log} --nodes=1 launch/slurm.sbatch"
        f" {made.shared}/config.yaml ray.cpus_per_worker=0.5",
    )
    job = sent.strip()
    started = f"until grep -q 'step ' {log}; do sleep 0.5; done"
    made.run(0, started)
    (line,) = [line for line in README.splitlines() if "scancel --batch" in line]
    (stop,) = re.findall(r"`(scancel --batch [^`]*)`", line)
    made.run(0, stop.replace("JOB", job))
    made.run(0, f"while squeue -h -j {job} 2>/dev/null | grep -q .; do sleep 0.5; done")
    printed = log.read_text()
    (step,) = re.findall(r"stopped at step (\d+)", printed)
    command = block("SLURM", "--resume").replace(
        "runs/decentral-JOB", f"{made.shared}/runs/decentral-{job}"
    )
    sbatch(made, f"{command.strip()} steps={int(step) + 3}")
    records = pandas.read_json(made.shared / f"runs/decentral-{job}/metrics.jsonl", lines=True)
    assert records.step.iloc[-1] == int(step) + 3

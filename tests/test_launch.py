"""What is in launch/ starts clusters: the steps of its README are run on hosts in network
namespaces, the SLURM script by SLURM itself, and each file is held to the schema of who reads it.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hosts
import jsonschema
import numpy as np
import pandas
import pytest
import yaml
from test_cli import call

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


def program(name: str) -> str | None:
    """The path of a program, if it is installed: beside Python, or anywhere else."""
    return shutil.which(name, path=os.pathsep.join([HERE, os.environ["PATH"]]))


def tool(name: str) -> str:
    """The path of a program; skips the test where it is not installed."""
    path = program(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def check_records(folder: Path, config: decentral.config.Config) -> None:
    """The run in `folder` is done, and has the simulator's records."""
    launched = pandas.read_json(folder / "metrics.jsonl", lines=True)
    simulated = decentral.run(config.model_dump(exclude_none=True), engine="sim").metrics
    assert list(launched.step) == list(simulated.step)
    assert list(launched.bytes_sent) == list(simulated.bytes_sent)
    for column in ("loss", "consensus_distance", "eval_loss", "sim_time_s"):
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
            "RAY_raylet_start_wait_time_s": "120",  # 30 are too few on busy cores
            "OMP_NUM_THREADS": "1",
        }
        for folder in ("home", "local"):
            (shared / folder).mkdir()
            for name in self.names:
                (shared / f"{folder}-{name}").mkdir()
        for name in self.names:  # as Debian has it: a host name that stands for loopback
            (shared / f"names-{name}").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")

    def command(self, i: int, script: str) -> list[str]:
        """What runs a bash script on machine i. The mounts are seen by the script alone."""
        own = [f"hostname {self.names[i]}"]
        for folder in ("home", "local"):
            mounted = self.shared / folder
            own.append(f"mount --bind {mounted}-{self.names[i]} {mounted}")
        own.append(f"mount --bind {self.shared}/names-{self.names[i]} /etc/hosts")
        return ["unshare", "--uts", "bash", "-ec", "\n".join([*own, f"cd {ROOT}", script])]

    def run(self, i: int, script: str, timeout_s: float = 300) -> str:
        done = self.hosts.run(
            i, *self.command(i, script), timeout_s=timeout_s, environment=self.environment
        )
        return done.stdout


@contextlib.contextmanager
def machines(k: int, routed: Sequence[int] = ()) -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="dc", dir="/tmp"))  # Ray's socket paths must be short
    try:
        with hosts.hosts(k, routed=routed) as made:
            yield Machines(made, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def config(quick):
    """A run of three workers, of which the outer two are no neighbours."""
    return load(quick, {"engine": "ray", "workers": 3, "topology": {"name": "path"}})


# By hand, and `ray job submit`


@pytest.fixture(scope="module")
def by_hand():
    """Three machines and a Ray cluster over them, by the README's steps; the last is behind a
    router, and the host name of each stands for loopback."""
    if NO_HOSTS is not None:
        pytest.skip(NO_HOSTS)
    with machines(3, routed=[2]) as made:
        made.run(0, block("By hand", "get-auth-token"))
        token = made.shared / "home-node0/.ray/auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        for i in (1, 2):
            folder = made.shared / f"home-node{i}/.ray"
            folder.mkdir()
            shutil.copy(token, folder)
        made.run(0, SOON_DEAD + block("By hand", "--head"))
        join = f"FIRST={made.hosts.addresses[0]}\n" + block("By hand", "--address=")
        with ThreadPoolExecutor() as others:
            list(others.map(lambda i: made.run(i, join), (1, 2)))
        yield made


# After how long a node that does not answer is dead to Ray: 16 s and not 65.
SOON_DEAD = """
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000
export RAY_health_check_failure_threshold=4
"""
TOKEN = "export RAY_AUTH_MODE=token\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_steps_start_a_cluster_that_takes_a_run(config, by_hand):
    made = by_hand
    changes = {"topology.name": "one_peer_exponential"}
    config = load(config.model_dump(exclude_none=True), changes)
    (made.shared / "config.yaml").write_text(dump(config))
    printed = made.run(0, TOKEN + block("By hand", "doctor").strip() + " --seconds 1")
    assert "all is well" in printed
    assert printed.count("resolves to 127.0.1.1") == 3
    command = block("By hand", "decentral run").replace("/shared", str(made.shared))
    command = command.replace("configs/quickstart.yaml", f"{made.shared}/config.yaml")
    printed = made.run(0, TOKEN + command)
    assert "3 workers on 3 nodes of the Ray cluster" in printed
    check_records(made.shared / "runs/first", config)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_job_runs_and_strangers_are_refused(config, by_hand):
    pytest.importorskip("aiohttp", reason="ray job submit needs decentral[cluster]")
    made = by_hand
    (made.shared / "config.yaml").write_text(dump(config))
    here = f"cp {made.shared}/config.yaml .\n{TOKEN}"
    submit = block("Run", "job submit")
    address, submitted = submit.splitlines()
    submitted = submitted.replace("/shared/runs/first", f"{made.shared}/runs/job")
    submitted = submitted.replace("configs/quickstart.yaml", "config.yaml")
    folder = f"mkdir {made.shared}/project\ncd {made.shared}/project\n"
    printed = made.run(0, f"{folder}{here}{address}\n{submitted}")
    assert "3 workers on 3 nodes of the Ray cluster" in printed
    check_records(made.shared / "runs/job", config)

    followed = made.run(0, f"{TOKEN}{address}\n{block('Run', 'logs')}")
    assert "Job 'first' succeeded" in followed
    assert f"step {config.steps}/{config.steps}" in followed

    stranger = f"{address}\nHOME=/nowhere\n"
    with pytest.raises(subprocess.CalledProcessError) as refused:
        made.run(0, f"{stranger}ray job list")
    assert "Missing authentication token" in refused.value.stderr
    with pytest.raises(subprocess.CalledProcessError) as refused:
        made.run(0, f"{stranger}export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong\nray job list")
    assert "Invalid authentication token" in refused.value.stderr


def diagnosis(made: Machines, timeout_s: int = 120) -> dict:
    """What the doctor says on the first machine, of a cluster where something is wrong."""
    doctor = f"decentral doctor --address auto --seconds 1 --timeout {timeout_s} --json"
    told = json.loads(made.run(0, f"{TOKEN}{doctor} || test $? = 1"))
    assert not told["well"]
    told["wrong"] = [finding for finding in told["findings"] if finding["wrong"]]
    return told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_doctor_names_two_hosts_whose_packets_are_dropped(by_hand):
    a, b = by_hand.hosts.addresses[1:3]
    by_hand.hosts.part(1, 2)
    try:
        told = diagnosis(by_hand)
    finally:
        by_hand.hosts.mend(1, 2)
    assert [finding["where"] for finding in told["wrong"]] == [f"{a} and {b}"]
    (finding,) = told["wrong"]
    assert finding["what"] == "cannot connect to each other: timed out"
    assert "firewalls" in finding["remedy"]
    pairs = {frozenset(link["nodes"]) for link in told["links"]}
    assert pairs == set(map(frozenset, itertools.combinations(by_hand.hosts.addresses, 2))) - {
        frozenset((a, b))
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_host_that_is_cut_off_during_a_run_is_named(config, by_hand):
    """The last test of the cluster: the host does not come back."""
    made = by_hand
    config = config.model_copy(update={"steps": 1_000_000, "on_worker_failure": "stop"})
    (made.shared / "config.yaml").write_text(dump(config))
    run, name = f"{made.shared}/runs/cut", made.hosts.names[2]
    printed = made.run(
        0,
        f"""{TOKEN}decentral run {made.shared}/config.yaml ray.address=auto --out {run} 2>&1 &
        until [ -s {run}/metrics.jsonl ]; do sleep 0.2; kill -0 $!; done
        ip -n {name} link set eth0 down
        SECONDS=0
        wait $! || echo "ended with $? after $SECONDS s"
        """,
    )
    (code, seconds) = re.findall(r"ended with (\d+) after (\d+) s", printed)[0]
    assert int(code) == 1
    assert int(seconds) < 60  # its neighbours miss it after 10 s, and Ray after 16
    address = made.hosts.addresses[2]
    (error,) = [line for line in printed.splitlines() if line.startswith("error:")]
    # At a step, or between two segments.
    named = rf"worker \d+ \(process \d+ on node {address}\) .*; stopped after \d+ steps"
    assert re.search(named, error)
    wrong = diagnosis(made, timeout_s=30)["wrong"]
    assert address in [finding["where"] for finding in wrong]


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


def slurm_knobs(made: Machines) -> str:
    folder = made.shared
    return f"VENV={folder}/venv RUNS={folder}/runs RAY_TMPDIR={folder}/local/ray"


def sbatch(made: Machines, command: str) -> str:
    """Submit the README's command for `command`, with its knobs; what the job printed, which ended
    well."""
    log = made.shared / "job.log"
    log.unlink(missing_ok=True)
    command = re.sub("^sbatch", f"sbatch --parsable --output={log}", command)
    try:
        assert exit_code(made, made.run(0, f"{slurm_knobs(made)} {command}").strip()) == 0
    finally:
        print(log.read_text() if log.exists() else "the job did not start")
    return log.read_text()


def exit_code(made: Machines, job: str) -> int:
    """Of a job, once it is over. `sbatch --wait` would look for that after 2, 10, 42, 74 s."""
    made.run(0, f"while squeue -h -j {job} 2>/dev/null | grep -q .; do sleep 0.5; done")
    (code,) = re.findall(r"ExitCode=(\d+):0", made.run(0, f"scontrol show job {job}"))
    return int(code)


@pytest.fixture(scope="module")
def slurm_cluster():
    for name in SLURM_TOOLS:
        tool(name)
    with slurm(3) as made:
        activate = made.shared / "venv/bin/activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(f"PATH={HERE}:$PATH\n")
        yield made


@pytest.mark.slow
@pytest.mark.timeout(900)
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@on_hosts
def test_a_slurm_job_that_runs_out_of_time_goes_on_from_its_checkpoint(config, slurm_cluster):
    made = slurm_cluster
    config = config.model_copy(update={"steps": 100_000})
    (made.shared / "config.yaml").write_text(dump(config))
    log = made.shared / "first.log"
    knobs = slurm_knobs(made)
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
    assert exit_code(made, job) == 130  # the run's own, stopped
    printed = log.read_text()
    (step,) = re.findall(r"stopped at step (\d+)", printed)
    command = block("SLURM", "--resume").replace(
        "runs/decentral-JOB", f"{made.shared}/runs/decentral-{job}"
    )
    sbatch(made, f"{command.strip()} steps={int(step) + 3}")
    records = pandas.read_json(made.shared / f"runs/decentral-{job}/metrics.jsonl", lines=True)
    assert records.step.iloc[-1] == int(step) + 3


# What reads the files, and its schema


@pytest.mark.parametrize("name", ["aws", "gcp", "on_premise"])
def test_rays_launcher_takes_the_cluster(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    stated = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    cluster = prepare_config(stated)
    validate_config(cluster)
    machines = len(stated["provider"].get("worker_ips", [])) or stated["metadata"]["machines"]
    started = sum(kind["min_workers"] for kind in cluster["available_node_types"].values())
    assert started == machines == cluster["max_workers"]  # a run wants all of them, all the time
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    setting = [*cluster["initialization_commands"], *cluster["docker"].get("run_options", [])]
    assert any("RAY_AUTH_MODE=token" in line for line in setting)
    commands = [key for key in cluster if key.endswith("_commands")]
    for command in [command for key in commands for command in cluster[key]]:
        subprocess.run(["bash", "-nc", command], check=True)


def fields(required: str, **properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


# The fields in use, of KubeRay's API reference for ray.io/v1 (1.5.1 and newer).
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
START = {"type": "object", "additionalProperties": TEXT}  # of `ray start`, all of them strings
POD = {"type": "object"}  # Kubernetes' own
CLUSTER = fields(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=fields("mode", mode={"const": "token"}),
    headGroupSpec=fields("rayStartParams template", rayStartParams=START, template=POD),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=START,
            template=POD,
        ),
    },
)
JOB = fields(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER,
)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_takes_the_manifest(kind):
    kubernetes = pytest.importorskip("kubernetes_validate")
    manifest = yaml.safe_load((LAUNCH / f"kuberay/{kind.lower()}.yaml").read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"] == kind
    jsonschema.validate(manifest["spec"], CLUSTER if kind == "RayCluster" else JOB)
    cluster = manifest["spec"] if kind == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()

    claim = yaml.safe_load((LAUNCH / "kuberay/storage.yaml").read_text())
    kubernetes.validate(claim, "1.31", strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (machines,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], machines):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **group["template"]}
        kubernetes.validate(pod, "1.31", strict=True)
        (volume,) = pod["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["spec"]["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
    assert machines["minReplicas"] == machines["replicas"] == machines["maxReplicas"]


def test_the_readmes_kubernetes_names_are_the_manifests():
    cluster, job = (
        yaml.safe_load((LAUNCH / f"kuberay/{name}.yaml").read_text())["metadata"]["name"]
        for name in ("raycluster", "rayjob")
    )
    text = "\n".join(shell_blocks("Kubernetes")).split()
    # The operator names the rest after them.
    for name in (f"raycluster/{cluster}", f"service/{cluster}-head-svc", f"rayjob/{job}"):
        assert name in text
    assert f"job/{job}" in text
    assert text[text.index("secret") + 1] == cluster
    assert f"ray.io/cluster={cluster},ray.io/node-type=head" in text


def test_the_command_of_the_rayjob_runs(tmp_path, monkeypatch, capsys):
    """Its config is in the image, at the folder that the Dockerfile copies the checkout to."""
    job = yaml.safe_load((LAUNCH / "kuberay/rayjob.yaml").read_text())
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    (folder,) = re.findall(r"^WORKDIR (\S+)$", dockerfile, flags=re.MULTILINE)
    command = job["spec"]["entrypoint"].replace(f"{folder}/", f"{ROOT}/")
    words = shlex.split(command.replace("/shared", str(tmp_path)))
    assert words[:2] == ["decentral", "run"]
    monkeypatch.setattr(sys, "path", list(sys.path))
    call(capsys, *words[1:], "engine=sim", "steps=2")
    assert (tmp_path / "runs/first/summary.json").exists()


def test_the_image_gets_what_it_installs():
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert kept[0] == "*"
    kept = [line[1:] for line in kept if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    # The package, what pyproject.toml names, and what the install and a run read.
    needed = "decentral pyproject.toml README.md LICENSE constraints.txt configs topologies"
    assert set(needed.split()) == set(kept)


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run(
        [tool("hadolint"), str(LAUNCH / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# Shell


@pytest.mark.parametrize("script", shell_blocks(), ids=lambda script: script.splitlines()[0][:40])
def test_the_readmes_shell_is_shell(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    shellcheck = program("shellcheck")
    if shellcheck is not None:
        # Knobs that one block sets and the next one reads, and a file that is not here.
        checked = subprocess.run(
            [shellcheck, "--shell=bash", "--exclude=SC2154,SC2034,SC1091", "-"],
            input=script,
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout


def test_the_slurm_script_passes_shellcheck():
    script = str(LAUNCH / "slurm.sbatch")
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"launch/[\w./]*\w", "\n".join(shell_blocks()))
    linked = [f"launch/{link}" for link in re.findall(r"\]\(([^)#:]+)\)", README)]
    linked += [link.split("#")[0] for link in re.findall(r"\]\((\.\./[^)]+)\)", README)]
    for name in {*named, *linked}:
        path = LAUNCH / name if name.startswith("..") else ROOT / name
        assert path.exists(), name
    for path in LAUNCH.rglob("*.*"):
        if path.suffix in (".yaml", ".sbatch"):
            assert path.relative_to(LAUNCH).as_posix() in README, path

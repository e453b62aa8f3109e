"""Whatever a config, an override or a graph file holds: a run, or exit code 2 and one message.

The examples are drawn anew, but the same ones each time, so that a failure stays one.
"""

import contextlib
import copy
import io
import shutil
import tempfile
from pathlib import Path

import networkx as nx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decentral import UserError, topology
from decentral.algorithms import PRESETS
from decentral.cli import main
from decentral.config import Config, load, parse_overrides
from decentral.topology.files import READERS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GRAPHS = sorted((ROOT / "topologies").glob("*.gml"))
settings.register_profile(
    "fuzz",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
BOUNDED = settings.get_profile("fuzz")

# 10**12 is beyond any machine's memory: a smaller number might be tried on a large one.
NUMBERS = st.sampled_from([0, -1, 1, 2, 7, 10**12, 2**63 - 1, 2**63, -(2**70), 2**200])
FLOATS = st.sampled_from([0.0, -0.5, 1e-308, 1e308, float("nan"), float("inf"), -float("inf")])
WORDS = st.sampled_from(
    ["", " ", "sgd", "ring", "null", "1e-3", "\0", "\ud800", "é", "../x", "a" * 5000, "a.b:c", "{"]
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, FLOATS, WORDS)
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(WORDS | st.just("name"), inner, max_size=3)
    ),
    max_leaves=5,
)


def small(workers=4):
    """A run of milliseconds, with a key of every section."""
    return {
        "name": "fuzz",
        "seed": 0,
        "workers": workers,
        "steps": 2,
        "engine": "sim",
        "dtype": "float64",
        "task": {"name": "quadratic", "batch_size": 2, "dim": 3, "sampling": "shuffle"},
        "optimizer": {"name": "adam", "lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8},
        "lr_schedule": {"name": "step", "milestones": [1], "gamma": 0.1},
        "gradient": {"clip_norm": 1.0, "accumulate": 1},
        "buffers": "average",
        "algorithm": {"name": "gossip_pga", "period": 2},
        "topology": {"name": "random_regular", "degree": 2, "weights": "metropolis"},
        "network": {
            "latency_ms": 0.1,
            "bandwidth_gbps": 10.0,
            "compute_ms": 1.0,
            "jitter": {"kind": "lognormal", "sigma": 0.1},
            "stragglers": {"probability": 0.1, "slowdown": 2.0},
            "nodes": {"workers_per_node": 2, "bandwidth_gbps": 100.0},
        },
        "record": {"every": 1, "evaluate_every": 1, "timeline": 1},
        "checkpoint": {"every": 1, "keep": 1},
        "sim": {"device": "cpu"},
        "ray": {"address": "auto", "timeout_s": 1.0},
    }


def paths(section, prefix=()):
    """The keys of a config, of its sections too."""
    for key, value in section.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def put(config, path, value):
    changed = copy.deepcopy(config)
    section = changed
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return changed


def command(*arguments):
    """Run the command line: its exit code, which must be 0 or 2, and what it said is wrong."""
    said, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
        try:
            main(list(arguments))
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
    assert code in (0, 2), said.getvalue()
    assert "Traceback" not in said.getvalue()
    return code


def run(config, code=None):
    """`decentral run` of a config, which leaves a run directory, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "config.yaml", Path(folder) / "out"
        file.write_text(yaml.safe_dump(config))
        exited = command("run", str(file), "steps=2", "engine=sim", "--out", str(out))
        assert code in (None, exited)
        assert out.exists() == (exited == 0)
        assert sorted(p.name for p in Path(folder).iterdir()) == (
            ["config.yaml", "out"] if exited == 0 else ["config.yaml"]
        )


KEYS = [path for path in paths(small()) if path not in (("steps",), ("engine",))]


def test_the_config_that_is_changed_runs():
    run(small(), code=0)


@settings(BOUNDED, max_examples=90)
@given(st.sampled_from(KEYS), JUNK)
def test_a_config_with_a_wrong_value_runs_or_is_refused(path, value):
    run(put(small(), path, value))


@settings(BOUNDED, max_examples=25)
@given(st.sampled_from([(), *(p[:-1] for p in KEYS)]), WORDS, JUNK)
def test_a_config_with_a_key_too_many_runs_or_is_refused(section, key, value):
    run(put(small(), (*section, key), value))


@settings(BOUNDED, max_examples=40)
@given(st.sampled_from(sorted(PRESETS)), st.dictionaries(WORDS, JUNK, max_size=2), NUMBERS)
def test_options_of_every_method_run_or_are_refused(name, junk, period):
    base = small() | {"optimizer": {"name": "sgd", "lr": 0.01}, "lr_schedule": None}
    run(put(base, ("algorithm",), {"name": name, "period": period, **junk}))
    run(put(base, ("algorithm",), {"name": name}))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_with_a_wrong_value_load_or_are_refused(file):
    shipped = yaml.safe_load(file.read_text())

    @settings(BOUNDED, max_examples=100)
    @given(st.sampled_from(list(paths(shipped))), JUNK)
    def check(path, value):
        with contextlib.suppress(UserError):
            assert isinstance(load(put(shipped, path, value)), Config)

    check()


@settings(BOUNDED, max_examples=300)
@given(st.text(max_size=30), st.sampled_from(["workers", "task.dim", "topology", "a.b.c", "."]))
def test_overrides_are_read_or_refused(text, key):
    with contextlib.suppress(UserError):
        assert isinstance(load(small(), parse_overrides([f"{key}={text}"])), Config)


HOSTILE = {
    "aliases that multiply": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    "merges that multiply": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)),
    "a value in itself": "optimizer: &a {name: sgd, lr: *a}",
    "a list in itself": "a: &a [*a]",
    "deep lists": "a: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "{a: " * 5000 + "1" + "}" * 5000,
    "a long integer": "workers: " + "9" * 5000,
    "a longer one": "workers: 0x" + "f" * 5000,
    "no such day": "name: 2026-99-99",
    "no such number": "workers: !!int ''",
    "an object": "name: !!python/object/apply:os.system ['exit 3']",
    "a long text": f"topology: {{file: {'a' * 5000}}}",
    "too many bytes": "#" * 300_000,
    "null bytes": "\0\0\0",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused(case, tmp_path):
    (tmp_path / "config.yaml").write_text(HOSTILE[case])
    with pytest.raises(UserError) as refused:
        load(tmp_path / "config.yaml")
    assert len(str(refused.value)) < 2000


EXTREMES = {
    "workers": ["workers=1000000000"],
    "steps of no integer": ["steps=1e30"],
    "links": ["topology={name: complete}", "workers=100000"],
    "rounds": ["topology={name: equi_dynamic, rounds: 1000000000000}"],
    "a batch": ["task.batch_size=1000000000000"],
    "batches a step": ["gradient.accumulate=1000000000000"],
    "parameters": ["task.dim=1000000000000"],
    "samples": ["task.samples_per_worker=1000000000000"],
}


@pytest.mark.parametrize("case", EXTREMES)
def test_what_no_machine_can_hold_is_refused(case, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small()))
    words = ["run", str(tmp_path / "config.yaml"), *EXTREMES[case], "--out", str(tmp_path / "out")]
    assert command(*words) == 2
    assert not (tmp_path / "out").exists()


def in_every_format():
    """A small graph, as the bytes of each format that is read."""
    graph = nx.cycle_graph(5)
    writers = {
        ".gml": nx.write_gml,
        ".graphml": nx.write_graphml,
        ".gexf": nx.write_gexf,
        ".edgelist": nx.write_edgelist,
        ".adjlist": nx.write_adjlist,
        ".net": nx.write_pajek,
        ".graph6": nx.write_graph6,
        ".sparse6": nx.write_sparse6,
    }
    folder = Path(tempfile.mkdtemp())
    try:
        for suffix, write in writers.items():
            write(graph, folder / f"graph{suffix}")
        files = {suffix: (folder / f"graph{suffix}").read_bytes() for suffix in writers}
    finally:
        shutil.rmtree(folder)
    return files | {
        ".json": b'{"nodes": [{"id": 1}, {"id": 2}], "edges": [{"source": 1, "target": 2}]}'
    }


SOURCES = list(in_every_format().items()) + [(".gml", p.read_bytes()[:4000]) for p in GRAPHS]


def test_every_format_is_fuzzed():
    assert {suffix for suffix, _ in SOURCES} == set(READERS)


@settings(BOUNDED, max_examples=400)
@given(
    st.sampled_from(SOURCES),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=6)), max_size=4),
    st.sampled_from(["", ".gz"]),
)
def test_a_damaged_graph_file_is_read_or_refused(source, edits, packed):
    suffix, content = source
    for place, length, bytes_ in edits:
        at = int(place * len(content))
        content = content[:at] + bytes_ + content[at + length :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"graph{suffix}{packed}"
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            assert topology.read(file).number_of_nodes() > 0

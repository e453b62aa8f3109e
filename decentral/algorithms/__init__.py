"""The methods: presets over a step rule, an averaging schedule and what may go with them.

A step rule is a class in a file of its own here, written against a `Replica`, so that the same
lines run on stacked workers in the simulator and on one worker of a cluster. Rules are
stateless: what they remember lives in `replica.state`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from decentral.algorithms.a2cid2 import A2CiD2
from decentral.algorithms.ad_psgd import ADPSGD
from decentral.algorithms.adapt_then_combine import AdaptThenCombine
from decentral.algorithms.choco import Choco
from decentral.algorithms.combine_then_adapt import CombineThenAdapt
from decentral.algorithms.compression import COMPRESSORS
from decentral.algorithms.consensus_based import ConsensusBased
from decentral.algorithms.d2 import D2
from decentral.algorithms.decentlam import DecentLaM
from decentral.algorithms.gradient_tracking import GradientTracking
from decentral.algorithms.noloco import NoLoCo
from decentral.algorithms.outer import OUTER, DiLoCo, SlowMo
from decentral.algorithms.parallel import Parallel
from decentral.algorithms.push_sum import PushSum
from decentral.algorithms.quasi_global_momentum import QuasiGlobalMomentum
from decentral.algorithms.relay import Relay
from decentral.algorithms.schedules import (
    Adaptive,
    ConsensusControl,
    Count,
    Every,
    Hierarchical,
    Never,
    Period,
    Positive,
    PostLocal,
    QuadraticRule,
    Schedule,
)
from decentral.algorithms.zeroth_order import ZerothOrder
from decentral.asynchronous import AsynchronousRule
from decentral.replica import Averaging, Compressor, Outer, StepRule
from decentral.signature import bind, choose

__all__ = ["COMPRESSORS", "OUTER", "PRESETS", "SCHEDULES", "Algorithm", "Averaging", "describe"]

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Algorithm:
    """A step rule, what the workers do between global averages, when those come, what the average
    is taken for, and the format of what neighbours send."""

    rule: StepRule | AsynchronousRule
    between: Averaging
    schedule: Schedule
    outer: Outer | None = None
    wire: Compressor | None = None
    gossip_period: int = 1  # neighbours average where (k+1) mod gossip_period = 0
    source: str = ""  # the preset's own, where it is not the rule's

    @property
    def needs_topology(self) -> bool:
        return self.between is Averaging.NEIGHBOURS

    @property
    def evaluations(self) -> int:
        """Losses that a step asks for in place of a gradient; 0 for a rule that has gradients."""
        return getattr(self.rule, "evaluations", 0)


def _gossip(rule: StepRule | AsynchronousRule, schedule: Schedule | None = None) -> Algorithm:
    return Algorithm(rule, Averaging.NEIGHBOURS, schedule or Never())


def _local(schedule: Schedule, source: str, outer: Outer | None = None) -> Algorithm:
    return Algorithm(AdaptThenCombine(), Averaging.NOBODY, schedule, outer, source=source)


def parallel_sgd() -> Algorithm:
    """Gradients averaged over all workers at every step: the baseline."""
    return Algorithm(Parallel(), Averaging.NOBODY, Never())


def local_sgd(period: Period) -> Algorithm:
    """Each worker alone; all average their models every `period` steps."""
    return _local(Every(period), "Stich 2019, arXiv 1805.09767")


def post_local_sgd(period: Period, start: Count | None = None) -> Algorithm:
    """A global average at every step before `start`, or the first decay of lr; then local SGD."""
    return _local(PostLocal(period, start), "Lin et al. 2020, arXiv 1808.07217")


def hierarchical_sgd(period: Period, group_period: Period, groups: Period) -> Algorithm:
    """Groups of workers average every `group_period` steps, all of them every `period` steps."""
    schedule = Hierarchical(period, group_period, groups)
    return _local(schedule, "Lin et al. 2020, arXiv 1808.07217")


def qsr(base_period: Period, alpha: Positive, warmup: Count = 0) -> Algorithm:
    """Local SGD whose period grows as (alpha / lr)^2 when the learning rate falls."""
    schedule = QuadraticRule(base_period, alpha, warmup)
    return _local(schedule, "Gu et al. 2024, arXiv 2310.14423")


def slowmo(period: Period, beta: Fraction = 0.5, alpha: Positive = 1.0) -> Algorithm:
    """Local SGD with slow momentum on the global averages."""
    return _local(Every(period), "Wang et al. 2020, arXiv 1910.00643", SlowMo(beta, alpha))


def diloco(period: Period = 500, lr: Positive = 0.7, momentum: Fraction = 0.9) -> Algorithm:
    """Local steps, AdamW's as a rule, and an outer Nesterov step on the global averages."""
    outer = DiLoCo(lr, momentum)
    return _local(Every(period), "Douillard et al. 2023, arXiv 2311.08105", outer)


def gossip_sgd() -> Algorithm:
    """Each worker averages with its neighbours at every step."""
    return replace(_gossip(AdaptThenCombine()), source="Lian et al. 2017, arXiv 1705.09056")


def gossip_pga(period: Period) -> Algorithm:
    """Gossip, with a global average instead of the gossip at every `period`-th step."""
    return _gossip(AdaptThenCombine(), Every(period))


def gossip_aga(
    initial_period: Period = 4, warmup: Count = 100, max_period: Period | None = None
) -> Algorithm:
    """Gossip-PGA whose period grows as the loss falls; fixed during `warmup` steps."""
    return _gossip(AdaptThenCombine(), Adaptive(initial_period, warmup, max_period))


def consensus_control(fraction: Positive = 1.0, every: Period = 4) -> Algorithm:
    """Gossip, with a global average whenever the workers have drifted too far apart."""
    algorithm = _gossip(AdaptThenCombine(), ConsensusControl(fraction, every))
    return replace(algorithm, source="Kong et al. 2021, arXiv 2102.04828")


def gossip_cta() -> Algorithm:
    """Gossip in the other order: average, then step; the exchange need not wait for gradients."""
    return _gossip(CombineThenAdapt())


def gradient_tracking() -> Algorithm:
    """Workers track the mean gradient: no bias from data that differ between workers."""
    return _gossip(GradientTracking())


def gt_pga(period: Period) -> Algorithm:
    """Gradient tracking with a global average, of model and tracker, at every `period`-th step."""
    return _gossip(GradientTracking(), Every(period))


def d2() -> Algorithm:
    """D2 / Exact Diffusion: gossip's traffic without its bias, on a static symmetric W."""
    return _gossip(D2())


def qg_dsgdm(beta: Fraction = 0.9, mu: Fraction = 0.9) -> Algorithm:
    """Gossip with quasi-global momentum."""
    return _gossip(QuasiGlobalMomentum(beta, mu))


def decentlam(beta: Fraction = 0.9) -> Algorithm:
    """Gossip with momentum that does not amplify the bias of large batches."""
    return _gossip(DecentLaM(beta))


def sgp() -> Algorithm:
    """Push-sum: gossip on directed graphs with column-stochastic weights."""
    return _gossip(PushSum())


def relay_sgd() -> Algorithm:
    """Models relayed along a spanning tree: no bias from data that differ, on sparse graphs."""
    return _gossip(Relay())


def noloco(period: Period = 50, lr: Positive = 0.7, momentum: Fraction = 0.5) -> Algorithm:
    """Local steps, and every `period` steps an outer step with neighbours, such as a random one."""
    return replace(_gossip(NoLoCo(lr, momentum)), gossip_period=period)


def ad_psgd(exchanges: Positive = 1.0) -> Algorithm:
    """Asynchronous gossip: neighbours average in pairs while they compute, and nobody waits."""
    return _gossip(ADPSGD(exchanges))


def a2cid2(
    exchanges: Positive = 1.0, eta: Positive | None = None, alpha: Positive | None = None
) -> Algorithm:
    """Asynchronous gossip with a continuous momentum, for graphs on which news travels slowly."""
    return _gossip(A2CiD2(exchanges, eta, alpha))


def choco_sgd(compression: dict[str, Any], consensus_step: Positive) -> Algorithm:
    """Gossip of compressed differences, with error feedback."""
    options = dict(compression)
    name = options.pop("name", "")
    key = "algorithm.compression"
    kind = choose(COMPRESSORS, name, f"{key}.name", "compressor")
    return _gossip(Choco(kind(**bind(kind, options, key, name=name)), consensus_step))


def zo_sgd(directions: PositiveInt = 10, mu: Positive = 1e-3) -> Algorithm:
    """Differences of losses along directions that all share, in the place of gradients."""
    return Algorithm(ZerothOrder(directions, mu), Averaging.NOBODY, Never())


def cbo(
    alpha: Positive = 30.0,
    drift: Positive = 1.0,
    noise: NonNegative = 1.0,
    anisotropic: bool = True,
    spread: NonNegative = 1.0,
    neighbours: bool = False,
) -> Algorithm:
    """Consensus-based optimisation: particles drift to the best of all, or of their neighbours."""
    rule = ConsensusBased(alpha, drift, noise, anisotropic, spread, neighbours)
    return Algorithm(rule, Averaging.NEIGHBOURS if neighbours else Averaging.NOBODY, Never())


PRESETS: dict[str, Callable[..., Algorithm]] = {
    "parallel_sgd": parallel_sgd,
    "local_sgd": local_sgd,
    "post_local_sgd": post_local_sgd,
    "qsr": qsr,
    "hierarchical_sgd": hierarchical_sgd,
    "slowmo": slowmo,
    "diloco": diloco,
    "gossip_sgd": gossip_sgd,
    "gossip_pga": gossip_pga,
    "gossip_aga": gossip_aga,
    "consensus_control": consensus_control,
    "gossip_cta": gossip_cta,
    "gradient_tracking": gradient_tracking,
    "gt_pga": gt_pga,
    "d2": d2,
    "qg_dsgdm": qg_dsgdm,
    "decentlam": decentlam,
    "sgp": sgp,
    "relay_sgd": relay_sgd,
    "noloco": noloco,
    "choco_sgd": choco_sgd,
    "zo_sgd": zo_sgd,
    "cbo": cbo,
    "ad_psgd": ad_psgd,
    "a2cid2": a2cid2,
}

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "never": Never,
    "every": Every,
    "post_local": PostLocal,
    "adaptive": Adaptive,
    "qsr": QuadraticRule,
    "hierarchical": Hierarchical,
    "consensus_control": ConsensusControl,
}

# What a required option is set to where a method is only described.
_TYPICAL: dict[str, Any] = {
    "period": 8,
    "group_period": 2,
    "groups": 2,
    "base_period": 4,
    "alpha": 0.0175,
    "compression": {"name": "top_k", "fraction": 0.1},
    "consensus_step": 0.4,
}


def describe() -> list[dict[str, str]]:
    """The table of methods for people, a row each: name, summary, options, equation, source, what
    a step sends, what it requires of W, and the floats that a worker holds from step to step
    beside its parameters, their gradient and what the local optimizer remembers."""
    rows = []
    for name, preset in PRESETS.items():
        parameters = inspect.signature(preset).parameters.values()
        required = [p.name for p in parameters if p.default is p.empty]
        algorithm = preset(**{option: _TYPICAL[option] for option in required})
        averages = not isinstance(algorithm.schedule, Never)
        holds = "nothing" if algorithm.outer is None else "2 D"
        sends = [algorithm.rule.sends] if algorithm.needs_topology or not averages else []
        if averages:
            sends.append("all-reduce of D at a global average")
        rows.append(
            {
                "name": name,
                "summary": inspect.getdoc(preset) or "",
                "options": ", ".join(
                    p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters
                ),
                "equation": _equation(algorithm),
                "source": algorithm.source or algorithm.rule.source,
                "sends": "; ".join(sends),
                "requires": (algorithm.rule.requires or "nothing")
                if algorithm.needs_topology
                else "nothing",
                "holds": getattr(algorithm.rule, "holds", holds),
            }
        )
    return rows


def _equation(algorithm: Algorithm) -> str:
    if algorithm.needs_topology or isinstance(algorithm.schedule, Never):
        return algorithm.rule.equation
    after = algorithm.outer.equation if algorithm.outer is not None else "x <- xbar"
    return f"x <- x - gamma g(x);  at a global average xbar: {after}"

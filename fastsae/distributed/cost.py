"""Cost of a layout before it is run: the bytes of every message of a training step, and the predicted time.

Bytes are counted, and a test holds them against what is sent. Times are predictions from the rates below, none of which
was measured on several GPUs. `python -m fastsae.distributed.cost docs/distributed.md` writes the table there.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from csrc_triton.plan import BANDWIDTH, FLOPS
from fastsae import planner
from fastsae.config import JointSAEConfig, TopKSAEConfig
from fastsae.distributed.layout import Layout
from fastsae.report import markdown
from fastsae.report import table as table_of

# Assumptions, bytes per second of one GPU in one direction: what a ring of GPUs in one machine reaches over NVLink (of
# 450e9 nominal), and one network adapter per GPU (of 50e9 nominal, 400 Gb/s).
NVLINK = 360e9
NETWORK = 40e9
GPUS_PER_MACHINE = 8
# Assumption: seconds until a message has gone once around, per rank in the ring.
LATENCY = 5e-6
# Bytes of an H200, and of those, what can be used.
_GPU = 141e9
MEMORY = planner.USABLE * _GPU
# Adam reads weight, gradient and two moments, and writes all but the gradient, which the backward wrote.
_ADAM_PASSES = 8
# Assumption: times that a sort of candidates reads and writes their keys and places, 12 bytes each.
_SORT_PASSES = 8
_NUMBER = 4  # fp32: weights, gradients, moments and messages


@dataclass(frozen=True)
class Message:
    """One collective operation of a step, as a rank sees it."""

    what: str
    kind: str
    """all-gather or all-reduce."""
    ranks: int
    """Number of ranks that share it."""
    payload: int
    """Bytes of the tensor a rank puts in."""
    seconds: float

    @property
    def moved(self) -> int:
        """Bytes a rank sends, and as many that it receives, in a ring."""
        return round(_ring(self.kind, self.ranks) * self.payload)


@dataclass(frozen=True)
class Cost:
    """A training step of one rank of a layout. Times are predicted."""

    layout: Layout
    messages: tuple[Message, ...]
    product: float
    """Seconds of the encoder's matrix product in 16 bits, and of writing and reading its result once."""
    ranking: float
    """Seconds of ranking the candidates of all feature ranks."""
    gathers: float
    """Seconds of the sums over active features and their gradients, by bytes."""
    adam: float
    """Seconds of the optimizer, by bytes."""
    memory: int
    """Bytes of weights, gradients, moments, and what grows with the batch."""
    rows: int
    """Rows of the whole batch."""

    @property
    def working(self) -> float:
        """Seconds of work that one rank alone would do too, of a smaller SAE on fewer rows."""
        return self.product + self.gathers + self.adam

    @property
    def sending(self) -> float:
        return sum(m.seconds for m in self.messages)

    @property
    def step(self) -> float:
        """Nothing is counted as hidden behind anything else."""
        return self.working + self.ranking + self.sending


def cost(config: TopKSAEConfig, batch_size: int, layout: Layout, auxk: int = 0) -> Cost:
    """Cost of a step on batches of `batch_size` rows in `layout`, with fp32 weights and 16-bit products."""
    each = layout.features_each(config.d_sae)
    if batch_size < layout.data:
        raise ValueError(f"cost: {batch_size} rows cannot be split over {layout.data} data ranks")
    rows, D, k, features = -(-batch_size // layout.data), config.d_in, config.k, layout.features
    counted = planner.plan(config, rows, feature_ranks=features)
    trained = sum(counted.parameters[name] for name in counted.trained)
    n, E = (config.n, config.d_embedding if config.interaction else 0) if isinstance(config, JointSAEConfig) else (0, 0)
    linear = isinstance(config, JointSAEConfig) and config.linear
    # Rows of weights that are read and gradients that are added up, as planner.plan counts operations.
    ours, our_n = _longest(k, features), _longest(n, features)
    widths = ours * D * 4 + (our_n * D * 3 if linear else 0) + our_n * E * 6
    ranked = rows * features * min(k, each) if features > 1 else 0
    return Cost(
        layout=layout,
        messages=tuple(_messages(config, rows, D, E, min(k, each), layout, _NUMBER * trained, each, auxk)),
        product=(2 * rows * D * each + 6 * rows * E * (E + D)) / FLOPS[2] + 2 * rows * each * 2 / BANDWIDTH,
        ranking=2 * _SORT_PASSES * ranked * 12 / BANDWIDTH,
        gathers=rows * widths * _NUMBER / BANDWIDTH,
        adam=_ADAM_PASSES * _NUMBER * trained / BANDWIDTH,
        memory=_memory(config, rows, features, planner.MEMORY[0]),
        rows=batch_size,
    )


def _memory(config: TopKSAEConfig, rows: int, features: int, kept: planner.Memory) -> int:
    return round(planner.on_gpu(config, _GPU, rows, kept, features))


def _longest(k: int, features: int) -> float:
    """Entries of the longest row on one rank, to which all are padded: the largest of many Poisson counts."""
    return k if features == 1 else min(k, k / features + 4.5 * math.sqrt(k / features))


def _messages(
    config: TopKSAEConfig, rows: int, D: int, E: int, k: int, layout: Layout, gradients: int, each: int, auxk: int
) -> list[Message]:
    found = []

    def add(what: str, kind: str, over: str, payload: int) -> None:
        ranks = layout.features if over == "features" else layout.data
        if ranks > 1 and payload:
            found.append(Message(what, kind, ranks, payload, seconds(kind, over, payload, layout)))

    # A candidate is a number and an index of four bytes each.
    add("candidates of the top-k", "all-gather", "features", rows * k * 8)
    add("partial sums: reconstruction, s, q", "all-reduce", "features", rows * (D + 2 * E) * _NUMBER)
    add("gradient of b_dec", "all-reduce", "features", D * _NUMBER if config.pre_bias else 0)
    if auxk:
        add("AuxK: candidates", "all-gather", "features", rows * min(auxk, each) * 8)
        add("AuxK: partial sums", "all-reduce", "features", rows * D * _NUMBER)
        add("AuxK: gradient of b_dec", "all-reduce", "features", D * _NUMBER if config.pre_bias else 0)
        add("AuxK: dead-feature counters", "all-reduce", "data", (each + 1) * 8)
    add("gradients", "all-reduce", "data", gradients)
    return found


def _ring(kind: str, ranks: int) -> float:
    """Times that a rank sends its payload: in an all-gather to each other rank, in an all-reduce twice around."""
    return ranks - 1 if kind == "all-gather" else 2 * (ranks - 1) / ranks


def seconds(kind: str, over: str, payload: int, layout: Layout) -> float:
    """The predicted time of one message among the feature ranks of a group, or among the data ranks of a shard."""
    ranks = layout.features if over == "features" else layout.data
    neighbours = min(layout.features, GPUS_PER_MACHINE)  # feature ranks are numbered side by side
    here = neighbours if over == "features" else max(1, min(layout.data, GPUS_PER_MACHINE // neighbours))
    # A group that spans machines leaves each of them through the adapters of those of its GPUs that are there.
    bandwidth = NVLINK if here == ranks else min(NVLINK, here * NETWORK)
    return _ring(kind, ranks) * payload / bandwidth + LATENCY * (ranks - 1) * (1 if kind == "all-gather" else 2)


def layouts(config: TopKSAEConfig, batch_size: int, ranks: int) -> list[Cost]:
    """All layouts of so many ranks, the fastest first; those that do not fit a GPU's memory last."""
    found = [
        cost(config, batch_size, Layout(ranks // features, features))
        for features in range(1, ranks + 1)
        if ranks % features == 0 and config.d_sae % features == 0 and ranks // features <= batch_size
    ]
    return sorted(found, key=lambda c: (c.memory > MEMORY, c.step))


def stops_scaling(config: TopKSAEConfig, batch_size: int, layout: Layout, over: str) -> Layout | None:
    """The first layout, with the "data" or "features" ranks of `layout` doubled again and again, whose ranks spend more
    time on one another (sending, and ranking what was sent) than on work of their own."""
    data, features = layout.data, layout.features
    while data <= batch_size and config.d_sae % features == 0:
        found = cost(config, batch_size, Layout(data, features))
        if found.sending + found.ranking > found.working:
            return found.layout
        data, features = (2 * data, features) if over == "data" else (data, 2 * features)
    return None


def report(config: TopKSAEConfig, batch_size: int, layout: Layout, steps: int) -> list[str]:
    """Lines of `fastsae plan` about a layout, and about so many steps in it."""
    found = cost(config, batch_size, layout)
    rows = [
        {
            "a step sends": m.what,
            "by": f"{m.kind}, {m.ranks} ranks",
            "MiB a rank": f"{m.moved / 2**20:,.1f}",
            "ms": f"{m.seconds * 1e3:,.2f}",
        }
        for m in found.messages
    ]
    fits = "" if found.memory <= MEMORY else f", more than the {MEMORY / 1e9:,.0f} GB counted on"
    told = (
        f"{found.step * 1e3:,.1f} ms a step, {found.rows / found.step:,.0f} rows/s, "
        f"{planner.duration(steps * found.step)} for all steps; {found.memory / 2**20:,.0f} MiB a GPU{fits}."
    )
    if layout.ranks == 1:
        return [f"Predicted, not measured, for one H200, the language model not counted: {told}"]
    turns = [
        f"More {name} ranks spend more time on one another than on work of their own "
        + (f"from {turn.data} x {turn.features} on." if turn else "never.")
        for name, over in (("data", "data"), ("feature", "features"))
        for turn in [stops_scaling(config, batch_size, layout, over)]
    ]
    return [
        table_of(rows),
        "",
        f"Predicted, not measured, for {layout.data} data x {layout.features} feature ranks on H200s in machines of "
        f"{GPUS_PER_MACHINE},",
        f"at {NVLINK / 1e9:,.0f} GB/s within a machine and {NETWORK / 1e9:,.0f} GB/s a GPU between them:",
        f"{found.working * 1e3:,.1f} ms working + {found.ranking * 1e3:,.1f} ms ranking + "
        f"{found.sending * 1e3:,.1f} ms sending: {told}",
        *turns,
    ]


# ---- the table of docs/distributed.md -------------------------------------------------------------------------------

_BATCH = 65536
_SAES = {
    f"{name} {kind}": make(d_in=4096, d_sae=d_sae, k=64)
    for name, d_sae in (("1M", 1 << 20), ("16M", 1 << 24))
    for kind, make in (("TopKSAE", TopKSAEConfig), ("JointSAE", JointSAEConfig))
}


def table() -> str:
    """Predicted steps of large SAEs on 8 to 64 GPUs, each in its fastest layout that fits in fp32; Markdown."""
    header = ["SAE", "GPUs", "data x features", "GB a GPU", "GB, narrow", "working ms", "ranking ms", "sending ms"]
    header += ["step ms", "rows/s", "stops scaling at"]
    lines = []
    for name, config in _SAES.items():
        for ranks in (8, 16, 32, 64):
            found = layouts(config, _BATCH, ranks)
            best = found[0] if found[0].memory <= MEMORY else min(found, key=lambda c: c.memory)
            narrow = _memory(config, _BATCH // best.layout.data, best.layout.features, planner.MEMORY[-1])
            held = [f"{best.memory / 1e9:,.0f}", f"{narrow / 1e9:,.0f}"]
            if best.memory > MEMORY:
                lines.append([name, str(ranks), "fp32 does not fit", *held, *[""] * 6])
                continue
            turn = stops_scaling(config, _BATCH, best.layout, "features")
            where = f"{turn.data} x {turn.features}" if turn else "never"
            layout = f"{best.layout.data} x {best.layout.features}"
            times = (f"{1e3 * t:,.0f}" for t in (best.working, best.ranking, best.sending, best.step))
            lines.append([name, str(ranks), layout, *held, *times, f"{best.rows / best.step:,.0f}", where])
    return markdown.table(header, lines)


if __name__ == "__main__":
    markdown.put_section(Path(sys.argv[1]), "predicted", table())

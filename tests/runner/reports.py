"""Reports for the tests of its pages: a small one whose numbers a reader can follow, a bare one, and any size."""

from __future__ import annotations

from moecli.runner.report import (
    Calibration,
    Check,
    Dendrogram,
    Environment,
    Figures,
    MetricRow,
    Report,
    SizeRecord,
    SizeSide,
    SourceRecord,
    StageRecord,
    Verification,
)

MIB = 2**20
RECIPE = """\
recipe: 1
model: org/Base-MoE
stages:
- run: calibrate/statistics
  with:
    dataset: /home/someone/texts/calibration.jsonl
- run: cluster/hc-smoe
  with:
    keep: 2
"""
ENVIRONMENT = Environment(python="3.11.7", torch="2.13.0", transformers="5.23.0", device="cpu (x86_64)")


def bare() -> Report:
    """A run that did nothing worth a figure."""
    return Report(
        name="bare",
        created_by="0.1.0",
        recipe="recipe: 1\n",
        source=SourceRecord(name="/data/models/tiny", kind="folder"),
        environment=ENVIRONMENT,
    )


def small() -> Report:
    """Two layers of four experts: the first merged to two, the second pruned to two."""
    return Report(
        name="half",
        created_by="0.1.0",
        created="2026-01-02T03:04:05Z",
        recipe=RECIPE,
        source=SourceRecord(name="org/Base-MoE", kind="hub", revision="0123456789abcdef", digest="d1" * 32),
        environment=ENVIRONMENT,
        stages=(
            StageRecord(
                name="calibrate/statistics",
                id="text",
                key="aa" * 32,
                cached=True,
                seconds=125.0,
                peak_cpu_bytes=3 * MIB,
                notes=("dtype bfloat16 (from config.json)",),
            ),
            StageRecord(
                name="cluster/hc-smoe",
                id="cluster/hc-smoe",
                key="bb" * 32,
                cached=False,
                seconds=1.5,
                peak_gpu_bytes=MIB,
                papers=("2410.08589",),
            ),
            StageRecord(name="merge/weighted", id="merge/weighted", key="cc" * 32, cached=False, seconds=2.0),
        ),
        export="stock",
        size=SizeRecord(
            before=SizeSide(
                bytes=8 * MIB,
                parameters=4_000_000,
                experts=(4, 4),
                router_rows=(4, 4),
                by_part={"experts": 6 * MIB, "attention": MIB, "embeddings": MIB},
            ),
            after=SizeSide(
                bytes=5 * MIB,
                parameters=2_500_000,
                experts=(2, 2),
                router_rows=(2, 2),
                by_part={"experts": 3 * MIB, "attention": MIB, "embeddings": MIB},
            ),
        ),
        metrics=(
            MetricRow(
                task="arc",
                metric="acc",
                before=0.75,
                before_stderr=0.03,
                after=0.5,
                after_stderr=0.04,
                samples=200,
                higher_is_better=True,
            ),
            MetricRow(
                task="arc",
                metric="acc_norm",
                before=0.7,
                before_stderr=0.03,
                after=0.71,
                after_stderr=0.03,
                samples=200,
                higher_is_better=True,
            ),
            MetricRow(
                task="text | two",
                metric="perplexity",
                before=10.5,
                after=float("inf"),
                samples=12,
                higher_is_better=False,
            ),
        ),
        calibration=Calibration(
            source={"dataset": "/home/someone/texts/calibration.jsonl", "samples": 4, "tokens_per_sample": 25},
            tokens=100,
        ),
        figures_data=Figures(
            load={0: (100, 50, 50, 0), 1: (10, 20, 30, 140)},
            dendrograms={
                0: Dendrogram(
                    linkage=((0.0, 2.0, 0.5, 2.0), (1.0, 3.0, 0.75, 2.0), (4.0, 5.0, 2.0, 4.0)), groups=(0, 1, 0, 1)
                )
            },
            kept={0: (0, 1), 1: (2, 3)},
            groups={0: (0, 1, 0, 1)},
        ),
        verification=Verification(
            status="passed", checks=(Check(name="tensors", passed=True, detail="12 names, all known"),)
        ),
        warnings=("1 expert <saw> no token",),
    )


def sized(layers: int, experts: int) -> Report:
    """Every layer clustered in a chain, half of the experts left."""
    left = max(1, experts // 2)
    chain = tuple((float(experts + e - 2 if e > 1 else 0), float(e), float(e), e + 1.0) for e in range(1, experts))
    groups = tuple([0] * (experts - left + 1) + list(range(1, left)))
    return small().model_copy(
        update={
            "figures_data": Figures(
                load={n: tuple((7919 * (n + 1) * (e + 1)) % 100_003 for e in range(experts)) for n in range(layers)},
                dendrograms={n: Dendrogram(linkage=chain, groups=groups) for n in range(layers)},
                groups=dict.fromkeys(range(layers), groups),
            )
        }
    )

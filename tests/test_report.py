"""Tables, plots, and what the committed results give: the README's section, a page, and its plots."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import PHASES, SHAPES, Shape, work
from benchmarks.report import gpus
from benchmarks.report.__main__ import main
from benchmarks.report.cells import figures
from benchmarks.report.page import page
from benchmarks.report.plots import plots
from benchmarks.report.readme import readme_section, render
from benchmarks.report.tables import ALIKE, faster
from benchmarks.report.terminal import steps_as_text
from fastsae import report

ROOT = Path(__file__).parents[1]


def test_table_aligns():
    text = report.table([{"SAE": "topk", "KL": "0.5"}, {"SAE": "joint", "KL": "0.25"}])
    assert text.splitlines() == ["SAE      KL", "-----------", "topk    0.5", "joint  0.25"]


def test_plot(tmp_path):
    for name in ("a", "b"):
        lines = [json.dumps({"rows": r, "fvu": 1 / r, "dead_share": 0.5}) for r in (1, 2, 3)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    report.plot_training({n: tmp_path / n for n in ("a", "b")}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# Provider to architecture, version, and about how many times the time of the fastest it takes.
PROVIDERS = {
    "fastsae TopKSAE, Trainer": ("topk", None, 1.0),
    "fastsae TopKSAE, Trainer, unit norm": ("topk", None, 1.45),
    "fastsae TopKSAE, Trainer, clipped": ("topk", None, 1.2),
    "fastsae TopKSAE, autograd": ("topk", None, 1.1),
    "fastsae TopKSAE, reference backend": ("topk", None, 30.0),
    "PyTorch TopK, topk + embedding_bag": ("topk", None, 4.5),
    "sparsify": ("topk", "1.3.3", 2.9),
    "SAELens, use_sparse_activations": ("topk", "6.54.12", 9.0),
    "fastsae JointSAE, Trainer": ("joint", None, 1.2),
    "PyTorch joint, dense": ("joint", None, 12.0),
}
# Of those who do more than Adam.
RECIPES = {
    "fastsae TopKSAE, Trainer, unit norm": "unit norm",
    "sparsify": "unit norm",
    "fastsae TopKSAE, Trainer, clipped": "clipped",
    "SAELens, use_sparse_activations": "clipped",
    "dictionary_learning": "clipped, unit norm",
}
GPU_WANTED = ("fastsae TopKSAE, CUDA backend", "needs an NVIDIA GPU")
SCALED = Shape("scaled", B=512, D=512, M=8192, K=32, N=16, E=64)
FLOPS, BYTES = 150e9, 12e9


def times(seconds: float) -> dict[str, Any]:
    return {"median": seconds, "min": 0.95 * seconds, "max": 1.1 * seconds, "seconds": [seconds]}


def cost(shape: Shape, provider: str) -> dict[str, float]:
    """Invented seconds of each phase."""
    kind, _, slow = PROVIDERS[provider]
    found = {p: slow * w.seconds(FLOPS, BYTES) for p, w in work(shape, kind == "joint").items()}
    return found | {"step": sum(found.values())}


def step_rows(shape: Shape, phases: tuple[str, ...]) -> list[dict[str, Any]]:
    gemm = 2 * shape.B * shape.M * shape.D / FLOPS
    rows: list[dict[str, Any]] = []
    for name, (kind, version, _) in PROVIDERS.items():
        for phase in phases:
            about = {"benchmark": "step", "phase": phase, "shape": shape.name, "provider": name, "architecture": kind}
            about["recipe"] = RECIPES.get(name, "plain")
            facts = {"version": version, "errors": {"reconstruction": 1.2e-7, "d W_enc": 3e-7}}
            facts["compared_rows"] = min(shape.B, 2**25 // shape.M)
            peak = {"peak_bytes": 3 * 10**9} if phase == "step" else {}
            rows.append(about | facts | times(cost(shape, name)[phase]) | {"gemm_seconds": [gemm, gemm]} | peak)
    for name, reason in (GPU_WANTED, ("dictionary_learning", "a | b, needs bf16")):
        about = {"benchmark": "step", "phase": "step", "shape": shape.name, "provider": name, "architecture": "topk"}
        rows.append(about | {"recipe": RECIPES.get(name, "plain"), "missing": reason})
    return [
        *rows,
        {"benchmark": "gemm", "shape": shape.name, "provider": "bare GEMM", "flops_per_second": FLOPS} | times(gemm),
    ]


def scaling_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    series = {"M": (2048, 8192, 32768), "K": (8, 32, 128), "B": (128, 512, 4096), "D": (128, 512, 2048)}
    for axis, shape in ((axis, SCALED.scaled(axis, size)) for axis, sizes in series.items() for size in sizes):
        about = {"benchmark": "scaling", "axis": axis, "size": getattr(shape, axis), "shape": asdict(shape)}
        gemm = times(2 * shape.B * shape.M * shape.D / FLOPS)
        rows.append(about | {"provider": "bare GEMM", "architecture": None} | gemm)
        for name, (kind, _, slow) in PROVIDERS.items():
            peak = int(16 * shape.parameters(kind == "joint") + 4 * slow * shape.B * shape.M)
            facts = {"provider": name, "architecture": kind, "peak_bytes": peak}
            rows.append(about | facts | times(cost(shape, name)["step"]))
    return rows


def quality_rows() -> list[dict[str, Any]]:
    chance, rows = random.Random(0), []
    for name, (kind, _, _) in PROVIDERS.items():
        for order in range(3 if name.endswith("Trainer") else 1):
            fvu = [0.9 / (1 + 0.1 * step) + 0.12 + chance.gauss(0, 0.003) for step in range(150)]
            about = {"benchmark": "quality", "provider": name, "architecture": kind, "order": order}
            about["recipe"] = RECIPES.get(name, "plain")
            rows.append(about | {"shape": asdict(SCALED), "fvu": fvu, "final": sum(fvu[-37:]) / 37})
    return rows


def trainer_rows() -> list[dict[str, Any]]:
    """SAELens' loop is 4.00 times as fast with our TopK, of which 60 % is not the SAE; sparsify is not installed."""
    gemm, rows = {"gemm_seconds": [0.5, 0.5]}, []
    for who, seconds in (("stock", 8.0), ("topk", 2.0), ("joint", 2.5)):
        about = {"benchmark": "trainer", "trainer": "SAELens", "who": who, "shape": "laptop", "version": "6.54.12"}
        facts = {"rows_per_second": 1024 / seconds, "sae_median": 0.4 * seconds}
        rows.append(about | facts | gemm | times(seconds))
    missing = {"benchmark": "trainer", "trainer": "sparsify", "who": "stock", "shape": "laptop", "missing": "absent"}
    return [*rows, missing]


def of_cpu() -> dict[str, Any]:
    """Results as `make bench` writes them."""
    ops = [
        {"benchmark": "op", "op": "sparse_decode", "direction": way, "shape": "laptop", "provider": name, "error": 2e-7}
        | times(seconds)
        for way in ("forward", "backward")
        for name, seconds in (("fastsae", 0.01), ("embedding_bag", 0.02))
    ]
    rows = [{"benchmark": "copy", "bytes_per_second": BYTES} | times(0.02)]
    rows += step_rows(SHAPES["laptop"], (*PHASES, "step")) + step_rows(SHAPES["bench"], ("step",))
    rows += ops + scaling_rows() + quality_rows() + trainer_rows()
    rows.append({"benchmark": "harvest", "tokens": 100_000, "d_in": 256} | times(9.0))
    hardware = {"cpu": "Some CPU", "cores": 2, "threads": 2, "instructions": "AVX2", "date": "2026-11-25"}
    versions = {"torch": "2.13.0", "commit": "abc1234"}
    return {"hardware": hardware, "versions": versions, "suite": "cpu", "seconds": 840, "rows": rows}


LAUNCH = {"kernel": "a_kernel", "config": "BLOCK=8", "warps": 4, "stages": 1, "bytes": 3e9, "flops": 0}
LAUNCH |= {"ms": {"median": 2.0}, "roof_ms": 1.5, "share": 0.75}


def of_gpu() -> dict[str, Any]:
    """Results as `make gpu` writes them."""
    ms = {"encode": {"median": 5.5, "p20": 5.4, "p80": 5.6}, "gemm": {"median": 5.0, "p20": 4.9, "p80": 5.1}}
    rows = [
        {"stage": "benchmark", "case": "encode, modern", "status": "ok", "ms": ms, "bars": {"encode / GEMM": 1.1}},
        {"stage": "benchmark", "case": "encode's GEMM", "status": "ok", "cublas": {"ms": ms}},
        {"stage": "benchmark", "case": "sparsify step", "status": "missing", "reason": "cannot be imported"},
        {"stage": "parity", "case": "all", "status": "ok"},
        {"stage": "launches", "case": "modern encode", "status": "ok", "launches": [LAUNCH, {"kernel": "not started"}]},
    ]
    outcome = {"status": "ok", "seconds": 61.2, "limit": 90.0, "counts": {"ok": 2, "missing": 1}}
    return {"hardware": {"gpu": "H100"}, "versions": {"torch": "2.13"}, "stages": {"benchmark": outcome}, "rows": rows}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository for which everything is written."""
    root = tmp_path_factory.mktemp("repository")
    (root / "benchmarks" / "results").mkdir(parents=True)
    put(root, "some-cpu", of_cpu())
    put(root, "some-gpu", of_gpu())
    (root / "README.md").write_text(
        "# head\n<!-- benchmarks: some-cpu -->\n<!-- /benchmarks -->\n"
        "<!-- gpu benchmarks -->\n<!-- /gpu benchmarks -->\n# tail\n"
    )
    main([], root)
    return root


@pytest.fixture
def kept(made: Path):
    """The repository of `made`; changes by a test are undone."""
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    yield made
    for path in made.rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()
    for path, content in before.items():
        path.write_bytes(content)


def put(root: Path, name: str, results: dict[str, Any]) -> None:
    (root / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(results))


def check(root: Path) -> None:
    main(["--check"], root)


def test_what_was_written_passes_the_check(made):
    check(made)


def test_the_repository_shows_what_was_measured():
    check(ROOT)


@pytest.mark.parametrize("file", ["README.md", "docs/benchmarks.md"])
def test_a_changed_digit_is_noticed(kept, file):
    path = kept / file
    text = path.read_text()
    place = text.index("| 1.00 |") + 2
    changed = text[:place] + "2" + text[place + 1 :]
    path.write_text(changed)
    with pytest.raises(SystemExit, match=rf"gives: {file}; run `python -m benchmarks.report`"):
        check(kept)
    assert path.read_text() == changed


def test_stale_plots_are_noticed(kept):
    results = of_cpu()
    for row in results["rows"]:
        if row["benchmark"] == "scaling" and row["axis"] == "K":
            row["median"] *= 1.01
    put(kept, "some-cpu", results)
    with pytest.raises(SystemExit, match=r"gives: docs/benchmarks/some-cpu-scaling.png; run"):
        check(kept)


def test_absent_damaged_and_left_over_plots_are_noticed(kept):
    folder = kept / "docs" / "benchmarks"
    (folder / "some-cpu-scaling.png").unlink()
    (folder / "some-cpu-memory.png").write_bytes(b"no image")
    (folder / "no-more-memory.png").write_bytes((folder / "some-cpu-quality.png").read_bytes())
    with pytest.raises(SystemExit) as said:
        check(kept)
    for name in ("some-cpu-scaling", "some-cpu-memory", "no-more-memory"):
        assert f"{name}.png" in str(said.value)
    assert "quality" not in str(said.value)
    main([], kept)
    check(kept)
    assert not (folder / "no-more-memory.png").exists()


def test_the_readme_table(made):
    readme = (made / "README.md").read_text()
    assert readme.startswith("# head\n<!-- benchmarks: some-cpu -->\n")
    assert readme.endswith("<!-- /gpu benchmarks -->\n# tail\n")
    assert "| training step, fp32, B=2048 d_in=1024 d_sae=65536 k=64 |" in readme
    table = [line for line in readme.split("<!-- /benchmarks -->")[0].splitlines() if line.startswith("|")]
    assert len(table) == 2 + 1 + len(PROVIDERS) + 1  # the bare GEMM, and one that is missing
    assert table[-1].startswith("| dictionary_learning | missing: a \\| b, needs bf16 |")
    # 2 B D M operations at FLOPS; the Trainer's step as cost() invents it.
    gemm, step = 2 * 2048 * 1024 * 65536 / FLOPS, cost(SHAPES["bench"], "sparsify")["step"]
    (sparsify,) = (line for line in table if line.startswith("| sparsify (1.3.3) |"))
    cells = [cell.strip() for cell in sparsify.split("|")[2:-1]]
    assert cells[0] == f"{step:.2f}"
    # Our Trainer that keeps decoder rows at norm 1 takes 1.45 times as long as the plain one.
    assert cells[2:] == [f"{step / gemm:.2f}", "2.90", "2.00", "3.00"]
    (saelens,) = (line for line in table if line.startswith("| SAELens, use_sparse_activations (6.54.12) |"))
    assert saelens.split("|")[6].strip() == "7.50"
    assert (
        "Peers that clip gradients or keep decoder rows at norm 1 are compared with our Trainer doing the same.\n"
        in readme
    )
    assert "(no GPU, or no native bf16, available): fastsae TopKSAE, CUDA backend.\n" in readme
    assert "3.0e-07 (d W_enc, fastsae TopKSAE, Trainer)" in readme
    assert "`make bench`, 14 minutes. [All tables and plots](docs/benchmarks.md#some-cpu)" in readme


def test_the_page(made):
    page = (made / "docs" / "benchmarks.md").read_text()
    for heading in ("Phases, shape `laptop`", "Operations, shape `laptop`", "Scaling", "Quality", "Harvest", "Missing"):
        assert f"### {heading}" in page
    assert "- dictionary_learning: a | b, needs bf16 (step)" in page
    assert "Compared with the specification at 512 rows; a batch has 2048." in page  # bench; laptop's are whole
    assert page.count("Compared with the specification") == 1
    for plot in ("phases-laptop", "scaling", "memory", "quality"):
        assert f"](benchmarks/some-cpu-{plot}.png)" in page
        assert (made / "docs" / "benchmarks" / f"some-cpu-{plot}.png").exists()


def test_the_largest_of_several_shapes_where_bench_is_absent():
    results = of_cpu()
    results["rows"] = [r for r in results["rows"] if r.get("shape") != "bench"] + step_rows(SHAPES["smoke"], ("step",))
    assert "B=1024 d_in=768" in readme_section("some-cpu", results)


def test_who_is_faster_is_said():
    results = of_cpu()
    assert f"No other provider is faster than {ALIKE}." in page({"x": results})
    assert "No other provider is faster than the same operation of fastsae." in page({"x": results})
    for row in results["rows"]:
        if row["benchmark"] == "step" and row["provider"] == "sparsify" and row["shape"] == "bench":
            row |= times(0.8 * cost(SHAPES["bench"], "fastsae TopKSAE, Trainer, unit norm")["step"])
        if row["benchmark"] == "op" and row["provider"] == "embedding_bag" and row["direction"] == "backward":
            row |= times(0.009)
    said = (
        "Faster than our Trainer training the same way (clipping, unit-norm decoder rows): sparsify (0.80 of its time)."
    )
    assert said in readme_section("x", results)
    assert said in page({"x": results})
    assert "embedding_bag in sparse_decode, backward (0.90 of its time)" in page({"x": results})


def test_nothing_is_claimed_where_ours_was_not_measured():
    said = faster("ours", [("a", None), ("b", 1.2)])
    assert said == "No other provider is faster than ours. Not compared, not available here: a."


def with_finals(finals: dict[str, float]) -> dict[str, Any]:
    """Results whose training runs are those of `finals`, each order of batches ending 1 % higher."""
    results = of_cpu()
    results["rows"] = [r for r in results["rows"] if r["benchmark"] != "quality" or r["provider"] in finals]
    for row in results["rows"]:
        if row["benchmark"] == "quality":
            row["final"] = finals[row["provider"]] * (1 + 0.01 * row["order"])
    return results


FINALS = {
    "fastsae TopKSAE, Trainer": 0.198,
    "fastsae TopKSAE, reference backend": 0.20,
    "PyTorch TopK, topk + embedding_bag": 0.21,
    "fastsae TopKSAE, Trainer, clipped": 0.16,
    "SAELens, use_sparse_activations": 0.17,
}


def test_quality_is_compared_with_those_who_train_so():
    made = page({"x": with_finals(FINALS)})
    assert "| **fastsae TopKSAE, reference backend** | TopK | plain | 0.2000 | standard |" in made
    assert "| **fastsae TopKSAE, Trainer** | TopK | plain | 0.1980 | -1.00 % |" in made
    assert "| PyTorch TopK, topk + embedding_bag | TopK | plain | 0.2100 | +5.00 % |" in made
    assert "| **fastsae TopKSAE, Trainer, clipped** | TopK | clipped | 0.1600 | standard |" in made
    assert "| SAELens, use_sparse_activations | TopK | clipped | 0.1700 | +6.25 % |" in made
    assert "(TopK 2.00 %)" in made


def test_quality_is_not_compared_with_who_comes_first_where_the_standard_is_missing():
    finals = {name: final for name, final in FINALS.items() if "reference" not in name and "clipped" not in name}
    made = page({"x": with_finals(finals)})
    assert "| PyTorch TopK, topk + embedding_bag | TopK | plain | 0.2100 | not measured |" in made
    assert "| SAELens, use_sparse_activations | TopK | clipped | 0.1700 | not measured |" in made


NAN = float("nan")
# By what was lost: whose rows, and what became of them; None: they are not there.
LOST = {
    "all": (lambda r: True, {"missing": "cannot be imported"}),
    "joint": (lambda r: r["architecture"] == "joint", {"missing": "cannot be imported"}),
    "standards": (lambda r: "reference" in r["provider"] or "Trainer, " in r["provider"], None),
    "first orders": (lambda r: r["order"] == 0, None),
    "diverged": (lambda r: r["provider"] in ("fastsae TopKSAE, Trainer", "sparsify"), {"fvu": [NAN], "final": NAN}),
    "cut short": (lambda r: r["provider"] == "sparsify", {"fvu": [0.9, 0.8]}),
}


def without_runs(whose: Callable[[dict[str, Any]], bool], became: dict[str, Any] | None) -> dict[str, Any]:
    results = of_cpu()
    lost = [r["benchmark"] == "quality" and whose(r) for r in results["rows"]]
    rows = [r | (became or {}) if gone else r for r, gone in zip(results["rows"], lost, strict=True)]
    return results | {"rows": [r for r, gone in zip(rows, lost, strict=True) if became or not gone]}


@pytest.mark.parametrize("what", LOST)
def test_lost_training_runs(tmp_path, what):
    results = without_runs(*LOST[what])
    assert readme_section("x", results)
    assert "TopK nan" not in page({"x": results})  # what chance alone changes
    drawn = plots(results)
    assert ("### Quality" in page({"x": results})) == ("quality" in drawn) == (what not in ("all", "first orders"))
    if "quality" in drawn:
        drawn["quality"].save(tmp_path / "plot.png")


def test_trainers_are_compared_with_their_own_saes():
    text = page({"cpu": of_cpu()})
    section = text[text.index("### Inside other trainers, shape `laptop`") :]
    lines = [line for line in section.splitlines() if line.startswith("| SAELens (6.54.12) |")]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert [c[0] for c in cells] == ["its own TopK SAE", "**fastsae TopK**", "**fastsae joint**"]
    assert [c[1:2] + c[3:] for c in cells] == [
        ["8.00", "128", "16.00", "1.00", "60%"],
        ["2.00", "512", "4.00", "4.00", "60%"],
        ["2.50", "410", "5.00", "3.20", "60%"],
    ]
    assert "- sparsify: absent (trainer)" in text


@pytest.mark.parametrize("kind", ["op", "scaling", "harvest", "trainer"])
def test_other_lost_rows(kind):
    results = of_cpu()
    for row in results["rows"]:
        if row["benchmark"] == kind:
            row["missing"] = "failed"
    assert readme_section("x", results)
    assert f": failed ({kind})" in page({"x": results})


def test_a_gpu(made):
    page = (made / "docs" / "benchmarks.md").read_text()
    assert "## some-gpu" in page
    assert "1.1  reached" in page
    assert "| benchmark | ok | 61 | 2 ok, 1 missing |" in page
    assert "| encode, modern | ok | encode 5.50, gemm 5.00 |" in page
    assert "| encode's GEMM | ok | cublas encode 5.50, cublas gemm 5.00 |" in page
    assert "| sparsify step | missing | cannot be imported |" in page
    assert "parity" not in page
    assert "| a_kernel | BLOCK=8 | 4, 1 | 3,000 | 2.00 | 1.50 | 75% |" in page
    readme = (made / "README.md").read_text()
    assert "| encode / bare GEMM, modern | at most 1.15 | 1.1 |" in readme
    assert "H100: torch 2.13, triton None" in readme


def test_without_a_gpu_the_readme_says_so():
    readme = "<!-- benchmarks: x -->\n<!-- /benchmarks -->\n<!-- gpu benchmarks -->\nold\n<!-- /gpu benchmarks -->"
    assert f"<!-- gpu benchmarks -->\n{gpus.NONE}\n<!-- /gpu benchmarks -->" in render(readme, {"x": of_cpu()})
    with pytest.raises(ValueError, match="expected one <!-- gpu benchmarks --> and one"):
        render(readme.split("<!-- gpu")[0], {"x": of_cpu()})


def test_a_bar_that_is_not_reached():
    results = of_gpu()
    results["rows"][0]["bars"] = {"encode / GEMM": 1.2}
    assert "| 1.2 (not reached) |" in gpus.readme_section({"some-gpu": results})


def test_another_file_for_the_readme(kept):
    results = of_cpu()
    results["hardware"]["cpu"] = "Another CPU"
    put(kept, "other-cpu", results)
    main(["--readme", "other-cpu"], kept)
    assert "<!-- benchmarks: other-cpu -->" in (kept / "README.md").read_text()
    assert "Another CPU" in (kept / "README.md").read_text()
    check(kept)
    with pytest.raises(SystemExit, match=r"to show some-gpu, .* `python -m benchmarks.report --readme NAME`"):
        main(["--readme", "some-gpu"], kept)


def test_a_readme_without_the_section():
    with pytest.raises(ValueError, match="must hold a section between <!-- benchmarks: NAME -->"):
        render("# fastsae\n<!-- benchmarks -->\n<!-- /benchmarks -->", {"some-cpu": of_cpu()})


def test_no_results(tmp_path):
    with pytest.raises(SystemExit, match=r"no results in .*: run `make bench`"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (("seconds",), "results without seconds"),
        (("hardware", "instructions"), "hardware without instructions"),
        (("rows", "step", "gemm_seconds"), "a row of benchmark step without gemm_seconds"),
        (("rows", "step", "recipe"), "a row of benchmark step without recipe"),
        (("rows", "step", "compared_rows"), "a row of benchmark step without compared_rows"),
        (("rows", "op", "max"), "a row of benchmark op without max"),
        (("rows", "gemm"), "no bare GEMM at shape laptop"),
        (("rows", "copy"), "no copy of memory"),
        (("rows", "step"), "no training step"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_an_older_form(kept, absent, said):
    results = of_cpu()
    what, *where = absent
    if what == "rows" and len(where) == 1:
        results["rows"] = [r for r in results["rows"] if r["benchmark"] != where[0]]
    elif what == "rows":
        del next(r for r in results["rows"] if r["benchmark"] == where[0])[where[1]]
    else:
        del (results[what] if where else results)[where[0] if where else what]
    put(kept, "some-cpu", results)
    with pytest.raises(SystemExit, match=rf"some-cpu.json is of an older form \({said}\): run `make bench`"):
        check(kept)


def test_what_is_no_form_at_all(kept):
    results = of_cpu()
    results["rows"].append({"benchmark": "memory"})
    put(kept, "some-cpu", results)
    with pytest.raises(SystemExit, match="rows of benchmark memory, which there is no more"):
        check(kept)
    (kept / "benchmarks" / "results" / "some-cpu.json").write_text('{"rows": [')
    with pytest.raises(SystemExit, match=r"some-cpu.json is no JSON"):
        check(kept)
    put(kept, "some-cpu", of_cpu())
    put(kept, "some-gpu", of_gpu() | {"rows": [{"stage": "benchmark"}]})
    with pytest.raises(
        SystemExit, match=r"some-gpu.json is of an older form \(a row without case, status\): run `make gpu`"
    ):
        check(kept)


def test_steps_as_text():
    rows = step_rows(SHAPES["laptop"], (*PHASES, "step"))
    text = steps_as_text(rows)
    header, _, first, *_ = text.splitlines()
    assert header.split()[1:] == [*PHASES, "step", "step", "/", "GEMM", "peak", "MB"]
    assert first.startswith("laptop: fastsae TopKSAE, Trainer")
    assert first.endswith(" 3000")
    assert "laptop: dictionary_learning missing: a | b, needs bf16" in text
    assert len({len(line) for line in text.splitlines()[: 2 + len(PROVIDERS)]}) == 1
    assert steps_as_text([r for r in rows if "missing" in r]).count("\n") == 1


def test_figures():
    found = [figures(v) for v in (float("nan"), 0.0, 0.001234, 0.1, 9.994, 12.34, 123.4, 123456.0)]
    assert found == ["nan", "0", "0.00123", "0.100", "9.99", "12.3", "123", "123,456"]

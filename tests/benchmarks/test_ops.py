"""The benchmark tells the truth: a wrong result gets no figure, and every op takes part."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHAPE, CPU = (2, 4, 16), torch.device("cpu")
MODULES = (
    "attention",
    "baselines",
    "checks",
    "op",
    "registry",
    "report",
    "run",
    "targets",
    "timing",
)


@pytest.fixture(scope="module")
def bench():
    """The modules of benchmarks/, which is not part of the installed package."""
    sys.path.insert(0, str(ROOT))
    modules = {m: importlib.import_module(f"benchmarks.ops.{m}") for m in MODULES}
    yield SimpleNamespace(**modules, step=importlib.import_module("benchmarks.models.step"))
    sys.path.remove(str(ROOT))


@pytest.fixture
def adaln(bench):
    return bench.registry.OPS[0]


def test_every_public_op_is_registered(bench):
    import dblocks.functional as F

    public = {name for name in F.__all__ if name[0].islower()}
    assert public == {op.name for op in bench.registry.OPS} - {"adaln_rms"}


def tiny(op):
    """A shape of `op`, with enough elements for the size of its noise to be compared."""
    if op.name == "doubled_attention":
        return (1, 4, 2, 9, 8)
    if op.name == "linear_cross_entropy":
        return (24, 17, 8)
    return (64, 8, 64) if op.oracle else SHAPE


def test_every_peer_is_right(bench):
    for op in bench.registry.OPS:
        inputs = op.make(tiny(op), torch.float32, CPU)
        assert bench.checks.wrong(op, op.ours, inputs) == ""
        assert bench.checks.wrong(op, op.eager, inputs) == ""


@pytest.fixture
def attention(bench):
    return bench.attention.OP


def test_peers_of_attention_may_differ(bench, attention, monkeypatch):
    shape = tiny(attention)
    contender = bench.op.Contender
    causal = contender(bench.attention.causal_2T, bench.attention._causal_definition)
    once = contender(
        lambda **x: tuple(o.detach() for o in attention.ours(**x)), None, "no backward"
    )
    peers = {"dblocks": attention.ours, "causal_2T": causal, "once": once, "wrong": causal.call}
    only(bench, monkeypatch, peers)
    rows = bench.run.measure(attention, shape, torch.float32, CPU, rounds=2)
    timed = {(row["peer"], row["direction"]) for row in rows if "ms" in row}
    both = {(p, d) for p in ("dblocks", "causal_2T") for d in bench.run.DIRECTIONS}
    assert timed == both | {("once", "forward")}
    once = [row for row in rows if row["peer"] == "once" and "ms" not in row]
    assert [row["absent"] for row in once] == ["no backward"] * 2
    assert all("budget" in row["wrong"] for row in rows if row["peer"] == "wrong")
    assert "absent: no backward" in bench.report.table(rows)


def test_the_reference_takes_its_turns_after_the_others(bench, adaln, monkeypatch):
    turns = []

    def interleaved(runs, device, rounds):
        turns.append(list(runs))
        return {name: [1.0] * rounds for name in runs}

    monkeypatch.setattr(bench.run.timing, "interleaved", interleaved)
    only(bench, monkeypatch, {"reference": adaln.eager, "dblocks": adaln.ours})
    rows = bench.run.measure(adaln, SHAPE, torch.float32, CPU, rounds=2)
    assert turns == 3 * [["copy", "dblocks"], ["reference"]]
    assert all(row["ms"] == 1 for row in rows)


def test_work_of_attention_is_that_of_allowed_pairs(bench, attention):
    N, H, heads, T, width = 2, 4, 2, 5, 8
    work = attention.work((N, H, heads, T, width), 4)
    pairs = N * H * int(bench.attention.doubled_mask(T).sum())
    assert (work.operations_forward, work.operations_backward) == (
        4 * width * pairs,
        10 * width * pairs,
    )
    inputs = attention.make((N, H, heads, T, width), torch.float32, CPU)
    (o,) = attention.eager(**inputs)
    assert work.bytes_forward == o.nbytes + sum(x.nbytes for x in inputs.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
def test_the_peers_of_attention_are_right(bench, attention):
    shape = (1, 2, 2, 128, 16)
    inputs = attention.make(shape, torch.float32, CPU)
    for name, peer in attention.peers(CPU).items():
        peer = bench.run.contender(peer)
        part = bench.run.part_of(attention, peer)
        assert bench.checks.wrong(part, peer.call, inputs, peer.definition) == "", name


def only(bench, monkeypatch, peers):
    monkeypatch.setattr(bench.run, "peers_of", lambda op, device: peers)


def test_a_wrong_output_gets_no_figure(bench, adaln, monkeypatch):
    op = adaln._replace(ours=lambda **k: (adaln.ours(**k)[0] + 1e-3,))
    only(bench, monkeypatch, {"dblocks": op.ours, "eager": op.eager})
    rows = bench.run.measure(op, SHAPE, torch.float32, CPU, rounds=2)
    ours = [row for row in rows if row["peer"] == "dblocks"]
    assert len(ours) == 3
    assert all("over the budget" in row["wrong"] and "ms" not in row for row in ours)
    assert all(row["ms"] > 0 for row in rows if row["peer"] == "eager")
    assert "wrong: error" in bench.report.table(rows)


def test_a_peer_without_memory_has_a_row(bench, adaln, monkeypatch):
    def full(**inputs):
        raise torch.OutOfMemoryError("34 GB of scores")

    calls = []

    def full_when_timed(**inputs):
        calls.append(len(calls))
        if len(calls) > 2:  # after the first call and the comparison
            raise torch.OutOfMemoryError("fragments")
        return adaln.eager(**inputs)

    op = adaln._replace(needs_grad=())
    peers = {"dblocks": op.ours, "full": full, "later": full_when_timed, "eager": op.eager}
    only(bench, monkeypatch, peers)
    rows = {row["peer"]: row for row in bench.run.measure(op, SHAPE, torch.float32, CPU, rounds=2)}
    assert rows["full"]["absent"] == "out of memory (34 GB of scores)"
    assert rows["later"]["absent"] == "out of memory"
    assert all("ms" not in rows[name] for name in ("full", "later"))
    assert all(rows[name]["ms"] > 0 for name in ("dblocks", "eager"))
    assert "absent: out of memory (34 GB" in bench.report.table(list(rows.values()))


def test_the_budget_leaves_out_the_last_shapes_and_names_them(bench, adaln, monkeypatch):
    only(bench, monkeypatch, {"dblocks": adaln.ours})
    other = next(op for op in bench.registry.OPS if op.name == "adaln_rms")
    done = []

    def measure(op, shape, *_, **__):
        done.append((op.name, shape))
        clock["now"] += 1.0
        return [row("dblocks", 1.0, op=op.name, shape=list(shape))]

    clock = {"now": 0.0}
    monkeypatch.setattr(bench.run, "measure", measure)
    monkeypatch.setattr(bench.run.time, "monotonic", lambda: clock["now"])
    seen, shapes = [], [(4, 64, 192), (2, 512, 768)]
    result = bench.run.run(
        CPU, ops=[adaln, other], shapes=shapes, dtypes=["float32"], rounds=2, budget=1.5,
        emit=seen.append,
    )  # fmt: skip
    assert done == [("adaln", shapes[0]), ("adaln_rms", shapes[0])]
    assert seen == result["rows"]
    left_out = [(r["op"], r["shape"]) for r in seen if r.get("absent", "").startswith("the budget")]
    assert left_out == [("adaln", list(shapes[1])), ("adaln_rms", list(shapes[1]))]
    assert "absent: the budget of 2 s is spent" in bench.report.table(seen[2:])


def test_the_reference_of_attention_takes_no_part_where_its_scores_are_too_many(bench):
    q = torch.empty(4, 32, 2 * 4096, 64, dtype=torch.bfloat16, device="meta")
    is_cuda = type("OnGpu", (), {
        "is_cuda": True, "shape": q.shape, "element_size": lambda self: q.element_size(),
    })()  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError, match="69 GB"):
        bench.attention.reference(is_cuda, is_cuda, is_cuda)


def test_a_wrong_gradient_gets_no_figure(bench, adaln):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    peer = lambda x, **k: adaln.eager(Halved.apply(x), **k)
    inputs = adaln.make(SHAPE, torch.float32, CPU)
    assert "over the budget" in bench.checks.wrong(adaln, peer, inputs)


def test_our_noise_is_compared_with_the_reference_and_not_by_its_size(bench):
    op = next(op for op in bench.registry.OPS if op.name == "noise_inject")
    inputs = op.make((64, 8, 64), torch.float32, CPU)
    other_seed = lambda y, sigma: op.eager(y, sigma)
    assert bench.checks.wrong(op, other_seed, inputs) == ""
    assert "budget" in bench.checks.wrong(op._replace(ours=other_seed), other_seed, inputs)
    twice = lambda y, sigma: tuple(2 * o for o in op.eager(y, sigma))
    assert "standard deviation" in bench.checks.wrong(op, twice, inputs)


def test_a_result_that_is_not_finite_is_wrong(bench, adaln):
    inputs = adaln.make(SHAPE, torch.float32, CPU)
    peer = lambda **k: (adaln.eager(**k)[0] * float("nan"),)
    assert bench.checks.wrong(adaln, peer, inputs) == "not finite"


def test_absent_peers_are_named(bench, adaln, monkeypatch):
    found = bench.baselines.peers_of(adaln, CPU)
    assert found["liger_layer_norm"] == "its kernels need a GPU"
    gpu = bench.baselines.peers_of(adaln, torch.device("cuda"))
    assert gpu["liger_layer_norm"].startswith("liger-kernel is not installed")
    only(bench, monkeypatch, {"dblocks": adaln.ours, "other": "not installed"})
    rows = bench.run.measure(adaln, SHAPE, torch.float32, CPU, rounds=2)
    assert "absent: not installed" in bench.report.table(rows)


@pytest.fixture
def result(bench, adaln, monkeypatch):
    only(bench, monkeypatch, {"dblocks": adaln.ours, "eager": adaln.eager})
    return bench.run.run(CPU, ops=[adaln], shapes=[SHAPE], dtypes=["float32"], rounds=2)


def test_a_result_file_round_trips_and_renders(bench, result, tmp_path, capsys):
    path = tmp_path / "ops-cpu.json"
    path.write_text(json.dumps(result))
    assert bench.report.read(path) == json.loads(json.dumps(result))
    assert bench.report.main([str(path), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "| adaln | 2x4x16 | float32 | both | dblocks |" in text
    assert (tmp_path / "out" / "ops-cpu.md").read_text() == text
    png = (tmp_path / "out" / "ops-cpu-adaln.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert {"device", "cpp", "torch", "triton", "commit"} <= result["environment"].keys()
    assert {row["direction"] for row in result["rows"]} == {"forward", "backward", "both"}


@pytest.mark.parametrize("text", ["no json", "[]", '{"format": 0}'])
def test_what_is_no_result_file(bench, tmp_path, text, capsys):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert bench.report.main([str(path)]) == 2
    assert "other.json" in capsys.readouterr().err


def row(peer, ms, **changes):
    base = {"op": "adaln", "shape": [4, 64, 192], "dtype": "float32", "direction": "forward"}
    return base | {"peer": peer, "ms": ms, "wrong": ""} | changes


def test_a_floor_is_judged_by_its_worst_case(bench):
    cases = [({}, 1.0), ({"dtype": "bfloat16"}, 0.5), ({"shape": [2, 512, 768]}, 2.0)]
    rows = [
        row(peer, ms, **changes)
        for changes, compiled in cases
        for peer, ms in (("dblocks", 0.5), ("torch.compile", compiled), ("eager", 2.0))
    ]
    text = bench.report.floors({"rows": rows})
    missed = next(line for line in text.splitlines() if "torch.compile" in line)
    assert "| 1.40x | 1.00x | 4x64x192 bfloat16 | 2 of 3 | **missed** |" in missed
    assert text.count("reached") == 2  # eager, at the small shape and at the others


def test_the_faster_form_of_a_peer_counts(bench):
    rows = [
        row("dblocks", 1.0, op="noise_inject"),
        row("torch.compile", 9.0, op="noise_inject"),
        row("torch.compile fallback_random", 3.5, op="noise_inject"),
    ]
    assert "| 3.00x | 3.50x |" in bench.report.floors({"rows": rows})


def test_the_comparison_names_what_changed(bench):
    old = {"rows": [row("dblocks", 1.0), row("eager", 2.0)]}
    same = {"rows": [row("dblocks", 2.0), row("eager", 4.1)]}
    slower = {"rows": [row("dblocks", 2.0), row("eager", 2.0)]}
    assert "No case changed" in bench.report.comparison(same, old)
    assert "| 2.00x | 1.00x | 0.50x |" in bench.report.comparison(slower, old)


def test_every_floor_is_of_a_registered_op_and_shape(bench):
    ops = {op.name: op for op in bench.registry.OPS}
    for floor in bench.targets.FLOORS:
        assert floor.op in ops
        assert any(
            floor.covers(floor.op, shape, dtype, floor.direction)
            for shape in ops[floor.op].shapes["cpu"]
            for dtype in bench.op.DTYPES["cpu"]
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_resident_memory(bench):
    size = 64 * 2**20
    peak = bench.timing.resident_peak_bytes(lambda: torch.ones(size // 4).sum())
    assert peak > 0
    assert peak < 4 * size


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
def test_the_command_prints_a_table_and_writes_a_record(bench, capsys, tmp_path):
    arguments = ["--op", "euler_step", "--shape", "2", "4", "16", "--rounds", "2"]
    assert (
        bench.run.main([*arguments, "--dtype", "float32", "--memory", "--out", str(tmp_path)]) == 0
    )
    assert "| euler_step | 2x4x16 | float32 | forward | torch.compile |" in capsys.readouterr().out
    record = bench.report.read(tmp_path / "ops-cpu.json")
    assert {row["peer"] for row in record["rows"]} == {"dblocks", "eager", "torch.compile"}
    assert all(row["peak_bytes"] >= 0 for row in record["rows"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
def test_the_training_step_has_a_row_for_each_form(bench):
    sizes = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 3, "heads": 2}
    rows = bench.step.measure(CPU, rounds=2, sizes=sizes)
    assert [r["wrong"] for r in rows] == [""] * 4
    assert all(r["ms"] > 0 for r in rows)
    by_form = {r["form"]: r for r in rows}
    fused, reference = by_form["block, fused"], by_form["block, reference"]
    assert fused["saved_mib"] < reference["saved_mib"]
    assert fused["launches"] < reference["launches"]
    assert fused["layers"] * 3 == by_form["end to end, fused"]["layers"]
    assert "| block, fused | 1 |" in bench.step.table(rows)


def test_a_wrong_step_gets_no_figure(bench, monkeypatch):
    sizes = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 3, "heads": 2}
    original = bench.step.forms

    def broken(device, sizes):
        found = original(device, sizes)
        fused = found["block, fused"]
        found["block, fused"] = fused._replace(loss=lambda: fused.loss() * 1.01)
        del found["block, torch.compile of the reference"]
        return found

    monkeypatch.setattr(bench.step, "forms", broken)
    rows = bench.step.measure(CPU, rounds=1 + 1, sizes=sizes)
    assert "ms" not in rows[0]
    assert "| block, fused | 1 | wrong: loss and norm" in bench.step.table(rows)

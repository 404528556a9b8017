"""The benchmark end to end at tiny shapes on the CPU: its rows, its verification, its comparison, its budget."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import ops, peers
from bench.cases import CASES, OPS, by_autograd
from bench.costs import cost_of
from bench.floors import Probe, probe_for
from bench.inputs import make_inputs
from bench.measure import Budget, problems
from bench.results import Row, compare, read_rows
from bench.shapes import LISTS, load_shapes, parse_shape
from bench.timing import measure, sets_needed, summarise
from bench.verify import Yardstick

CPU = torch.device("cpu")
TINY = "linear:300x8x50,head:300x16x20,sequences:4x12,sequences:1x40,logits:40x30"
QUICK = "airl,torch eager,airl plain torch,python loop"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[ops.Document, list[Row], dict]:
    """(the document, the rows read back from its JSON, the JSON) of one run of everything but the compilers."""
    document = ops.measure_ops(shapes=TINY, backends=QUICK, device="cpu", seconds=0.02)
    path = tmp_path_factory.mktemp("bench") / "new" / "rows.json"
    document.write(path)
    return document, read_rows(path), json.loads(path.read_text())


def test_every_case_has_a_row_of_ours_and_ours_are_right(tiny):
    document, _, _ = tiny
    shapes = load_shapes(TINY)
    expected = {(p.case.op, p.case.mode, p.shape.name) for p in problems(shapes, OPS)}
    assert {(r.op, r.mode, r.shape) for r in document.rows if r.backend == "airl"} == expected
    assert {case.op for case in CASES} == {op for op, _, _ in expected}
    assert document.of_kind("failed") == []
    assert ops.exit_code(document) == 0


def test_the_numbers_of_a_row_agree_with_each_other(tiny):
    document, _, _ = tiny
    for row in document.rows:
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert row.samples >= 3
        assert row.percent_of_floor == pytest.approx(100 * row.floor_ms / row.ms)
        assert row.gb_per_s == pytest.approx(row.bytes / (row.ms * 1e-3) / 1e9)
        assert row.tflop_per_s == pytest.approx(row.flops / (row.ms * 1e-3) / 1e12)
        needed = row.flops / 1e12 if row.bound == "gemm" else row.bytes / 1e9
        assert row.floor_ms == pytest.approx(1e3 * needed / row.floor_rate)
        assert 0 <= row.error <= row.budget < 0.01
        assert (row.bound == "gemm") == row.op.startswith("linear")


def test_ratios_are_peers_over_ours(tiny):
    document, _, _ = tiny
    by_key = {(r.op, r.mode, r.shape, r.backend): r for r in document.rows}
    compared = 0
    for (op, mode, shape, backend), row in by_key.items():
        if backend != "airl":
            assert row.ratio_to_peer == {}
            continue
        for peer, ratio in row.ratio_to_peer.items():
            other = by_key[op, mode, shape, peer]
            assert ratio == pytest.approx(other.ms / row.ms)
            assert row.memory_ratio_to_peer[peer] == pytest.approx(other.peak_mib / row.peak_mib)
            compared += 1
    assert compared == sum(row.backend != "airl" for row in document.rows) > 15


def test_json_holds_the_rows_and_where_they_come_from(tiny):
    document, read, value = tiny
    assert read == document.rows
    assert {"schema", "device", "commit", "versions", "threads", "seconds", "rows", "absent"} <= value.keys()
    assert value["versions"]["torch"] == torch.__version__
    assert value["rows"][0].keys() == Row.__dataclass_fields__.keys()
    reasons = {(entry["backend"], entry["kind"]): entry["reason"] for entry in value["absent"]}
    assert reasons["python loop", "skipped"] == "it is not written as such a loop."


def test_peak_memory_is_that_of_the_tensors(tiny):
    """Eager discounted returns of [4, 12] float32: columns and their stack. Ours: the result and its offsets."""
    document, _, _ = tiny
    peak = {r.backend: r.peak_mib * 2**20 for r in document.rows if (r.op, r.shape) == ("gae", "sequences:4x12")}
    result = 2 * 4 * 12 * 4
    assert result <= peak["airl"] < 4 * result
    head = {r.backend: r.peak_mib * 2**20 for r in document.rows if r.op == "linear_logprob" and r.mode == "no_grad"}
    assert head["torch eager"] >= 2 * 300 * 50 * 4 > 0


def test_a_run_that_is_stopped_leaves_the_problems_it_has(tmp_path, monkeypatch):
    path, make = tmp_path / "rows.json", peers.airl.prepare

    def stop_at_gae(case, shape):
        if case.op == "gae":
            raise KeyboardInterrupt
        return make(case, shape)

    monkeypatch.setattr(peers.airl, "prepare", stop_at_gae)
    with pytest.raises(KeyboardInterrupt):
        ops.measure_ops(
            shapes="sequences:4x12", backends="airl", device="cpu", seconds=0.01, save_to=path,
            ops="discounted_returns,gae",
        )  # fmt: skip
    assert [row.op for row in read_rows(path)] == ["discounted_returns"]


def test_a_peer_that_raises_is_reported_and_fails_nothing(monkeypatch):
    def prepare(case, shape):
        raise RuntimeError("no kernel image\nand more")

    broken = SimpleNamespace(NAME="broken", version=lambda: "1", unavailable=lambda device: None, prepare=prepare)
    monkeypatch.setattr(ops, "BACKENDS", (peers.airl, broken))
    document = ops.measure_ops(shapes="logits:8x30", ops="selective_log_softmax", device="cpu", seconds=0.02)
    assert {entry.reason for entry in document.of_kind("failed")} == {"RuntimeError: no kernel image"}
    assert len(document.rows) == 3
    assert ops.exit_code(document) == 0


@pytest.mark.parametrize(
    ("peer", "case"),
    [
        (peer, case)
        for peer in (peers.trl, peers.liger, peers.liger_scaled)
        for case in CASES
        if (case.family == "linear" and peer is not peers.liger) or case.op == "linear_ppo_loss"
    ]
    + [(peers.trl, case) for case in CASES if case.family == "logits"],
    ids=lambda value: value.NAME if hasattr(value, "NAME") else f"{value.op} {value.mode}",
)
def test_peers_compute_the_same_thing(peer, case):
    reason = peer.unavailable(CPU)
    if reason:
        pytest.skip(reason)
    shape = parse_shape("linear:64x8x50" if case.family == "linear" else "logits:40x30")
    run = peer.prepare(case, shape)
    check = Yardstick(case, shape, torch.float32, CPU).check(
        run, make_inputs(case, shape, torch.float32, CPU), ours=False
    )
    assert check.passed, check


# ---- comparison and budget -----------------------------------------------------------------------------------------


def test_compare_flags_a_slowdown(tiny, tmp_path, capsys):
    document, rows, _ = tiny
    before = [replace(row, ms=row.ms * (0.5 if row.backend == "airl" else 1.05)) for row in rows]
    changes = compare(before, rows)
    assert len(changes) == len(rows)
    assert all(change.slower == (change.now.backend == "airl") for change in changes)
    assert compare([replace(row, device="another") for row in rows], rows) == []

    path = tmp_path / "base.json"
    base = [replace(row, ms=row.ms / 1e6) for row in rows if row.op == "gae"]
    replace(document, rows=base).write(path)
    arguments = ["--shapes", "sequences:4x12", "--ops", "gae", "--backends", "airl", "--device", "cpu"]
    assert ops.main([*arguments, "--compare", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 rows slower" in printed
    assert printed.count("SLOWER") == 1


def test_a_budget_leaves_out_rows_and_says_which():
    document = ops.measure_ops(shapes=TINY, backends="airl,torch eager", device="cpu", budget=1e-9)
    todo = problems(load_shapes(TINY), OPS)
    assert document.rows == []
    left_out = document.of_kind("left out")
    assert len(left_out) == 2 * len(todo)
    assert left_out[0].reason == "the 1e-09 s of --budget-s were used up."
    assert f"left out: airl: {left_out[0].reason} (linear_logprob frozen f+b linear:300x8x50" in ops.render(document)


def test_a_budget_is_shared_among_the_problems_left():
    now = iter([0.0, 10.0, 10.0, 10.0, 100.0]).__next__
    budget = Budget(100.0, clock=now)
    assert budget.deadline(problems_left=9) == pytest.approx(10 + 2 * 90 / 9)
    assert not budget.is_used()
    assert budget.is_used()
    assert Budget(None).deadline(3) is None


def test_the_cases_with_targets_come_first_and_every_shape_is_used():
    for name in LISTS:
        todo = problems(load_shapes(name), OPS)
        ranks = [problem.case.rank for problem in todo]
        assert ranks == sorted(ranks)
        assert {problem.shape.name for problem in todo} == set(LISTS[name])
    gpu = LISTS["gpu"]
    heads = ("896x151936", "1536x151936", "3584x152064", "4096x128256")
    assert {f"linear:{n}x{head}" for n in (4096, 16384) for head in heads} < set(gpu)
    assert {f"head:32768x{head}" for head in heads} | {"sequences:272x300", "sequences:1x1048576"} < set(gpu)


def test_eager_liger_and_the_compiler_come_before_the_other_peers():
    assert [backend.NAME for backend in peers.BACKENDS][:5] == [
        "airl", "torch eager", "liger", "liger scaled ce", "torch.compile",
    ]  # fmt: skip


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_costs_follow_the_design():
    def cost(op: str, mode: str, shape: str):
        (case,) = (c for c in CASES if (c.op, c.mode) == (op, mode) and c.family == shape.split(":")[0])
        return cost_of(case, parse_shape(shape), 2)

    product = 2 * 4096 * 896 * 151936
    shape = "linear:4096x896x151936"
    assert cost("linear_logprob", "no_grad", shape).flops == product
    assert cost("linear_logprob", "frozen f+b", shape).flops == 2 * product
    assert cost("linear_logprob", "trainable f+b", shape).flops == 4 * product
    assert cost("linear_ppo_loss", "frozen f+b", shape).flops == 2 * product
    assert cost("linear_ppo_loss", "trainable f+b", shape).flops == 3 * product
    assert cost("linear_logprob", "frozen f+b", shape).row_bytes == 6 * 4096 * 151936
    assert cost("token_rewards", "forward", "head:100x896x50").bytes == 2 * 100 * 896
    assert cost("discriminator_loss", "f+b", "head:100x896x50").bytes == 4 * 100 * 896
    assert cost("discounted_returns", "forward", "sequences:272x300").bytes == 9 * 272 * 300
    assert cost("discounted_returns", "forward", "sequences:1x1000").bytes == 8 * 1000
    assert cost("selective_log_softmax", "f+b in place", "logits:64x1000").bytes == 6 * 64 * 1000


def test_a_product_is_written_to_whole_cache_lines():
    """Rows of an odd length would be the library's slowest product, and no floor."""
    (case,) = (c for c in CASES if (c.op, c.mode) == ("linear_ppo_loss", "frozen f+b"))
    shape = parse_shape("linear:6x32x299of320")
    inputs = make_inputs(case, shape, torch.float32, torch.device("cpu"))
    out = probe_for(cost_of(case, shape, 4), inputs, torch.device("cpu")).call(0)
    assert (out.shape, out.stride()) == ((6, 299), (320, 1))
    torch.testing.assert_close(out, inputs.hidden.detach() @ inputs.head.detach().T)


def test_no_token_of_the_discriminators_loss_is_skipped():
    """Its floor charges every row."""
    (case,) = (c for c in CASES if (c.op, c.mode) == ("discriminator_loss", "f+b"))
    inputs = make_inputs(case, parse_shape("head:200x8x5"), torch.float32, torch.device("cpu"))
    assert inputs.weights.gt(0).all() and len(inputs.weights.unique()) > 1


def test_a_floor_scales_the_probe():
    probe = Probe(name="copy GB/s", call=lambda _: None, work=2.0)
    (case,) = (c for c in CASES if c.op == "gae")
    cost = cost_of(case, parse_shape("sequences:100x1000"), 4)
    assert probe.rate(4.0) == pytest.approx(500.0)
    assert probe.floor_ms(cost, 4.0) == pytest.approx(17 * 100_000 / 500e9 * 1e3)


def test_timing_takes_turns_through_the_input_sets():
    seen: list[tuple[str, int]] = []
    spin = torch.randn(400, 400)

    def call(name: str):
        def run(number: int) -> None:
            seen.append((name, number))
            _ = spin @ spin

        return run

    timings = measure({"a": call("a"), "b": call("b")}, CPU, num_sets=3, seconds=0.05)
    assert set(timings) == {"a", "b"}
    assert {number for _, number in seen} == {0, 1, 2}
    names = "".join(name for name, _ in seen)
    assert "ab" in names[len(names) // 2 :]
    assert "ba" in names[len(names) // 2 :]
    assert timings["a"].samples >= 5


def test_quantiles_and_sets():
    timing = summarise([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (timing.p20, timing.median, timing.p80) == pytest.approx((1.8, 3.0, 4.2))
    assert sets_needed(64 << 20, CPU) == 1
    assert sets_needed(10 << 20, CPU) == 7
    assert sets_needed(1, CPU) == 256


def test_a_function_without_backward_makes_no_gradients():
    case = next(c for c in CASES if c.mode == "no_grad")
    inputs = make_inputs(case, parse_shape("linear:8x4x10"), torch.float32, CPU)
    result = by_autograd(case, lambda i: i.hidden.sum(1))(inputs)
    assert result.gradients == ()
    assert not result.outputs[0].requires_grad


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ops", "nope"], "--ops nope: give some of linear_logprob"),
        (["--backends", "nope"], "--backends nope: give some of airl"),
        (["--shapes", "linear:3x4"], "--shapes linear:3x4: give cpu, gpu"),
        (["--shapes", "linear:0x4x5"], "--shapes linear:0x4x5: give cpu, gpu"),
        (["--shapes", "linear:3x4x9of8"], "--shapes linear:3x4x9of8: give cpu, gpu"),
        (["--shapes", "logits:3x4of8"], "--shapes logits:3x4of8: give cpu, gpu"),
        (["--shapes", "absent.json"], "--shapes absent.json: cannot be read"),
        (["--ops", "gae", "--shapes", "logits:4x5"], "--ops and --shapes have nothing in common"),
        (["--budget-s", "-3"], "--budget-s -3: give a number of seconds above 0"),
        (["--compare", "absent.json"], "--compare absent.json: is no result of"),
        (["--device", "tpu"], "argument --device: invalid choice"),
        (["--nope"], "unrecognized arguments: --nope"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_end_in_one_sentence(arguments, sentence, capsys):
    assert ops.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"bench.ops: {sentence}")
    assert printed.err.count("\n") == 1


def test_shapes_from_a_file(tmp_path, capsys):
    path = tmp_path / "shapes.json"
    path.write_text('["logits:4x50", "sequences:2x3"]')
    assert [shape.tokens for shape in load_shapes(str(path))] == [4, 6]
    path.write_text('{"logits": 4}')
    assert ops.main(["--shapes", str(path)]) == 2
    assert "write a JSON list of names" in capsys.readouterr().err


def test_the_plot_is_drawn(tiny, tmp_path):
    from bench.report import plot

    document, _, _ = tiny
    plot(document.rows, tmp_path / "rows.png", "title")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")

"""benchmarks/accelerator.py: the parts, what is kept of them, and one tiny network of ours.

The whole command is run by .ci/run, with --rehearse.
"""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(HERE))

import accelerator  # noqa: E402
import compare  # noqa: E402
import figures  # noqa: E402
import kernels  # noqa: E402
import sections  # noqa: E402
import worker  # noqa: E402
from networks import NETWORKS, tiny  # noqa: E402


def rows(*values):
    return {"ours": {"train step": figures.figure(values, "ms")}}


def test_a_run_that_is_cut_off_keeps_what_it_has_and_goes_on(tmp_path):
    path, called = tmp_path / "found.json", []
    broken = {"peak"}

    def part(name):
        def measure(so_far):
            called.append(name)
            if name in broken:
                raise RuntimeError(f"no {name}\nand more")
            return rows(len(so_far) + 1.0)

        return accelerator.Part(name, measure)

    todo = [part(name) for name in ("machine", "peak", "loop/bare", "loop", "remat")]
    clock = iter(range(0, 100, 3)).__next__
    results = figures.Results(path, {"rehearsal": False})
    left = accelerator.measure(todo, results, budget=10.0, clock=clock)
    assert left == ["loop", "remat"]
    kept = json.loads(path.read_text())["parts"]
    assert list(kept) == ["machine", "peak", "loop/bare"]
    assert kept["peak"] == {"failed": "RuntimeError: no peak"}

    broken.clear()
    called.clear()
    results = figures.Results(path, {"rehearsal": False})
    assert accelerator.measure(todo, results, budget=1e9) == []
    assert called == ["peak", "loop", "remat"]  # what failed, and what was left
    again = json.loads(path.read_text())["parts"]
    assert again["machine"] == kept["machine"]
    assert not any("failed" in part for part in again.values())
    assert "| bare ours | 3, n=1 |" in path.with_suffix(".md").read_text()


def test_figures_of_another_kind_are_not_mixed_or_lost(tmp_path, capsys):
    for text, said in (
        ('{"about": {"rehearsal": false}, "parts": {}}', "rehearsal = False, and this is True"),
        ('{"about": {"rehearsal": true, "device": "A"}, "parts": {}}', "with device = A, and"),
        ('{"loss": 1}', "is no file of benchmarks/accelerator.py"),
        ("[1]", "is no file of benchmarks/accelerator.py"),
    ):
        path = tmp_path / "found.json"
        path.write_text(text)
        assert accelerator.run(["--rehearse", f"--out={path}"]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
        assert path.read_text() == text
    with pytest.raises(SystemExit):
        accelerator.arguments(["--loop-override=training.batch_size"])
    assert "must be KEY=VALUE" in capsys.readouterr().err


def test_every_section_network_precision_and_batch_is_there():
    full = list(accelerator.chosen(accelerator.arguments(["--loop-override=data.flip=False"])))
    names = [part.name for part in full]
    assert names[:2] == ["machine", "peak"]
    assert len(set(names)) == len(names)
    assert {part.section for part in full} == set(accelerator.SECTIONS)
    wanted = {
        f"networks/{name} {precision} batch {batch}"
        for name, sizes in sections.BATCHES.items()
        for precision in sections.PRECISIONS
        for batch in sizes
    }
    assert len(wanted) == 36
    assert {name for name in names if name.startswith("networks/")} == wanted
    assert {"loop/bare", "loop", "loop/data.flip=False"} <= set(names)
    few = [part.name for part in accelerator.chosen(accelerator.arguments(["--rehearse"]))]
    assert {name.partition("/")[0] for name in few} == set(accelerator.SECTIONS)
    assert len(few) < len(names) / 2


@pytest.mark.parametrize("least", [1, 2, 9])
def test_out_of_memory_is_a_row_and_no_end(monkeypatch, least):
    """Two sides that fit one at a time, then only PyTorch's, then both together."""
    alive = []

    class Side:
        def __init__(self, name, *given, **options):
            self.name = name
            alive.append(name)

        def ask(self, ask, **more):
            if len(alive) > least or (least == 1 and self.name == "ours"):
                raise compare.OutOfMemory(self.name)
            if ask == "analysis":
                return {"train": {"flops": 2e9, "temporary_bytes": 2**20}}
            seconds = {"train": 1.0, "forward": 1.0}
            return {"compile": seconds, "time": [0.01], "memory": 2**20}[ask]

        def end(self):
            alive.remove(self.name)

    monkeypatch.setattr(sections, "Side", Side)
    setup = sections.Setup(rounds=2, seconds=0.01, tiny=True)
    peaks = {"bfloat16 ours": {"product": figures.figure([1.0], "TFLOP/s")}}
    found = sections.network("cifar10", "bfloat16", 4, setup, peaks, what=("train",))
    assert not alive
    theirs = found[sections.THEIRS]
    assert theirs["train step"] == figures.figure([10.0, 10.0], "ms")
    assert theirs["peak memory"]["median"] == 1.0
    if least == 1:
        assert found["ours"] == {"train step": "out of memory"}
        assert "ours over it, train step" not in theirs
    else:
        assert found["ours"]["train step of peak"]["median"] == pytest.approx(20.0)  # %
        assert theirs["ours over it, train step"]["median"] == 1.0
    assert ("out of memory" in figures.markdown(results_of(found))) == (least == 1)


@pytest.mark.parametrize("longest", [0.5, 5.0])
def test_what_takes_long_is_timed_once(longest):
    asked = []

    class Side:
        def __init__(self, name):
            self.name = name

        def ask(self, ask, *, calls, **more):
            asked.append((self.name, calls, more.get("chained")))
            return [1.0 if self.name == "ours" else 0.1] * calls

    sides = [Side("ours"), Side("theirs")]
    found = compare.in_turns(sides, "sample", 3, 1.0, longest=longest)
    assert found["ours"] == [1.0] * (1 if longest < 1 else 3)
    assert found["theirs"] == [0.1] * (1 if longest < 1 else 3)
    assert len(asked) == (2 if longest < 1 else 12)
    if longest > 1:  # each goes first in its turn
        last = [name for name, _, _ in asked[6:]]
        assert last == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
        assert asked[-2:] == [("theirs", 10, None), ("ours", 2, None)]


def results_of(found):
    results = figures.Results(Path("does/not/exist.json"), {"rehearsal": True})
    results.parts["networks/cifar10"] = found
    return results


@pytest.mark.parametrize(
    ("ours_on", "theirs_on", "said"),
    [
        ("gpu", "cuda", None),
        ("cpu", "cpu", None),
        ("gpu", "cpu", "left out: it computes on cpu here"),
        ("tpu", "cuda", "left out: it computes on cuda here"),
        ("gpu", None, "left out: torch or diffusers is not installed"),
    ],
)
def test_pytorch_is_left_out_where_it_is_not_on_the_same_device(
    monkeypatch, ours_on, theirs_on, said
):
    class Side:
        def __init__(self, name, *given, **options):
            self.name = name

        def ask(self, ask):
            return {"platform": ours_on if self.name == "ours" else theirs_on}

        def end(self):
            pass

    def version(name):
        if name == "torch" and theirs_on is None:
            raise sections.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(sections, "Side", Side)
    monkeypatch.setattr(sections, "version", version)
    found = sections.machine().get("PyTorch")
    assert found == said or found.startswith(said)
    if said:
        compiled = accelerator._compiled(lambda _: sections.Setup(torch=found), "cifar10", 4, {})
        assert f"| {found} |" in figures.markdown(results_of(compiled))


def test_what_is_lack_of_memory():
    class OutOfMemoryError(RuntimeError):
        pass

    for error in (RuntimeError("RESOURCE_EXHAUSTED: 1 GiB"), OutOfMemoryError(), MemoryError()):
        assert worker.is_out_of_memory(error)
    assert not worker.is_out_of_memory(ValueError("INVALID_ARGUMENT"))


def test_kernels_of_a_gpus_trace_are_counted_once():
    def name(kind, pid, value, tid=0):
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": value}}

    def event(pid, tid, name, duration, **args):
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": duration, "args": args}

    trace = [
        name("process_name", 1, "/device:GPU:0"),
        name("thread_name", 1, "Stream #7(Compute)", 3),
        name("thread_name", 1, "XLA Ops", 4),
        name("thread_name", 1, "XLA Modules", 5),
        name("process_name", 9, "/host:CPU"),
        event(1, 3, "conv", 30.0, hlo_op="c"),
        event(1, 3, "conv", 50.0, hlo_op="c"),
        event(1, 3, "norm", 20.0),
        event(1, 4, "fusion.1", 80.0, hlo_op="c"),
        event(1, 5, "jit_step", 100.0),
        event(9, 1, "dispatch", 500.0),
        event(9, 1, "host_op", 7.0, hlo_op="h"),
    ]
    found = kernels.of_events(trace)
    assert found == {"conv": pytest.approx([30e-6, 50e-6]), "norm": pytest.approx([20e-6])}
    assert kernels.most_expensive(found, 1) == [("conv", pytest.approx(0.8), 2)]
    tpu = [e for e in trace if e.get("tid") != 3]
    assert kernels.of_events(tpu) == {"fusion.1": pytest.approx([80e-6])}
    assert kernels.of_events(trace[-2:]) == {"host_op": pytest.approx([7e-6])}


def test_our_worker_times_counts_and_profiles_a_network(tmp_path):
    import ours

    network = tiny(NETWORKS["dit"])._replace(batch_size=2, ddim_steps=2)
    bench = ours.Bench(network, dtype="bfloat16")
    assert set(worker.answer(bench, {"ask": "compile"})) == set(sections.TITLES)
    counts = worker.answer(bench, {"ask": "analysis"})
    assert counts["train"]["flops"] > counts["forward"]["flops"] > 0
    before = int(bench.state.step)
    chained = {"ask": "time", "what": "train", "calls": 2, "chained": 3, "warm": True}
    assert len(worker.answer(bench, chained)) == 2
    assert int(bench.state.step) == before + 7
    for what in ("forward", "step", "sample"):
        assert min(worker.answer(bench, {"ask": "time", "what": what, "calls": 1})) > 0
    errors = worker.answer(bench, {"ask": "gradient_errors", "batches": 2})
    assert len(errors["bfloat16"]) == 2
    assert 1e-4 < min(errors["bfloat16"]) < max(errors["bfloat16"]) < 0.1
    worker.answer(bench, {"ask": "profile", "folder": str(tmp_path), "calls": 1})
    found = kernels.most_expensive(kernels.kernels(tmp_path))
    assert 3 < len(found) <= 10
    assert sum(share for _, share, _ in found) <= 1.0 + 1e-6

"""The flag --profile, on a short training that goes on."""

import gzip
import json
from types import SimpleNamespace

import jax
import pytest

from ddpm.training.profiling import profiled
from tests import runs


def test_steps_are_traced_into_the_run_folder(own_run):
    done = runs.run(runs.command(own_run, "--profile=2", training__steps=13))
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("profile of")]
    assert said.startswith(f"profile of 2 steps in {own_run / 'profile'}: open its newest *.trace")
    (file,) = (own_run / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum("train_step" in name for name in names) in (2, 4)  # JAX marks a call once or twice
    assert not [name for name in names if name.startswith("$")]  # of Python's calls

    done = runs.run(runs.command(own_run, "--profile=5", training__steps=20))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line == (
        "error: --profile=5: needs 8 steps, 3 of them to warm up; 7 are left to step 20; raise "
        "config.training.steps"
    )


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (range(21, 40), [23, "stop", "profile of 5 steps in folder"]),
        ((24, 28, 32, 36), [24, "stop", "profile of 8 steps in folder"]),  # several at once
        (range(21, 26), [23, "stop", "profile of 2 steps in folder"]),  # and a signal to stop
        (range(21, 22), []),
    ],
)
def test_when_it_begins_and_ends(monkeypatch, at, expected):
    seen = []
    progress = SimpleNamespace(step=20, metrics=())
    start = lambda folder, **options: seen.append(progress.step)  # noqa: E731
    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    say = lambda text: seen.append(text.split(":")[0])  # noqa: E731
    with profiled("folder", 5, first=20, last=40, say=say) as callback:
        for progress.step in at:
            callback(progress)
    assert seen == expected

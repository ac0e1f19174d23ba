"""Two processes of two devices each train as one process does."""

import json
import socket

import numpy as np

from tests import runs


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one(tmp_path, shared_run):
    one, two = shared_run, tmp_path / "two"
    address = f"localhost:{free_port()}"
    processes = [
        runs.start(
            runs.command(two, f"--distributed={address},2,{i}"),
            JAX_NUM_CPU_DEVICES="2",
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "4 x cpu" in said[0]

    def losses(workdir):
        return [json.loads(row)["loss"] for row in (workdir / "metrics.jsonl").open()]

    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    step, arrays = runs.final_state(two)
    assert step == runs.final_state(one)[0]
    for a, b in zip(arrays, runs.final_state(one)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert (two / "samples" / "step_00000008.png").read_bytes()

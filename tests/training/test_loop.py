"""The loop keeps up with the devices, so that a stop need not wait for what is queued."""

import pytest

from ddpm.training import loop


@pytest.mark.parametrize(("step_s", "most"), [(0.3, 1), (0.02, 25), (7.0, 1)])
def test_half_a_second_of_steps_is_queued_at_most(monkeypatch, step_s, most):
    now, queued, waits = 0.0, 0, []

    class Metrics:  # ready once the steps queued are done
        def block_until_ready(self):
            nonlocal now, queued
            now, queued, _ = now + queued * step_s, 0, waits.append(queued)

    class Stop:
        def requested(self, step):
            return False

    def step(state, metrics, batch):
        nonlocal queued
        queued += 1
        return state, metrics

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    loop.run(loop.Progress(0, None, Metrics()), step, [(range(1), (0,))] * 200, [], Stop())
    assert abs(max(waits, default=200) - most) <= 1

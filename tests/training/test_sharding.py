"""Eight devices and one: the same losses and weights."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ddpm.errors import InputError
from ddpm.training import sharding
from tests import runs
from tests.runs import command

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from ddpm import UNet, schedules
from ddpm.training import sharding
from ddpm.training.objectives import simple
from ddpm.training.optimizer import adam
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step

mesh = sharding.data_mesh()
everywhere = sharding.replicated(mesh)
model = UNet(channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(),
             num_groups=4, dropout=0.1)
schedule, optimizer = schedules.linear(100), adam(1e-3, grad_clip=1.0)
state = jax.jit(lambda: init(model, optimizer, (8, 8, 1), 0), out_shardings=everywhere)()
metrics = jax.jit(Metrics.zero, out_shardings=everywhere)()
step = jax.jit(make_train_step(model, simple(schedule), optimizer, ema_decay=0.9, seed=0),
               in_shardings=(everywhere, everywhere, sharding.split_batch(mesh)),
               out_shardings=everywhere, donate_argnums=(0, 1))
losses = []
for i in range(5):
    images = np.random.default_rng(i).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    batch = sharding.to_devices(mesh, images)
    assert len(batch.sharding.device_set) == jax.device_count()
    state, metrics = step(state, metrics, batch)
    losses.append(float(metrics.loss))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
weights = [float(jnp.abs(x).sum()) for x in jax.tree.leaves(state.params)]
print(json.dumps([jax.device_count(), losses, weights]))
"""


def run(devices):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_train_as_one_does():
    one, eight = run(1), run(8)
    assert (one[0], eight[0]) == (1, 8)
    np.testing.assert_allclose(eight[1], one[1], rtol=1e-5)
    # Biases without a gradient (of attention keys) hold rounding errors, made large by Adam.
    np.testing.assert_allclose(eight[2], one[2], rtol=1e-3, atol=1e-5)


OBJECTIVES = {
    "learned schedule": {
        "diffusion__schedule": "learned",
        "diffusion__prediction": "v",
        "model__noise_input": "log_snr",
        "training__loss": "continuous_bound",
        "training__times": "low_discrepancy",
        "training__ema": "power",
        "training__self_conditioning": True,
    },
    "important times": {
        "diffusion__variance": "learned_range",
        "diffusion__num_steps": 2,  # so that all losses that are remembered are there in time
        "training__loss": "hybrid",
        "training__times": "importance",
        "model__num_classes": 10,
        "training__label_dropout": 0.5,
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_devices_train_any_objective_as_one_does(name, tmp_path, monkeypatch):
    losses = []
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")  # for processes that start from here on
    for devices, run_main in ((1, runs.run), (2, runs.process)):
        workdir = tmp_path / str(devices)
        small = {"model__num_res_blocks": 1, "training__log_every": 1}
        done = run_main(command(workdir, **OBJECTIVES[name], **small))
        assert done.returncode == 0, done.stderr
        assert f"{devices} x " in done.stdout + done.stderr
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        losses.append([[line["loss"], line["grad_norm"]] for line in lines if "loss" in line])
    assert len(losses[0]) == 8
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_batch_that_does_not_divide_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.setattr(sharding.jax, "device_count", lambda: 8)
    sharding.check_batch_size(64, "training.batch_size")
    with pytest.raises(InputError, match=r"training.batch_size = 60.*devices, 8.*nearest is 64"):
        sharding.check_batch_size(60, "training.batch_size")

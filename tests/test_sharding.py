"""Eight devices and one: the same losses and weights."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import UNet, schedules
from ddpm.errors import InputError
from ddpm.training import sharding
from ddpm.training.objectives import simple
from ddpm.training.optimizer import adam
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step
from tests import runs

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
SMALL = {  # of the transformer of `runs.TINY`; the UNet is trained by hand
    "training__batch_size": 16,  # two for each of eight devices
    "training__log_every": 1,
    "training__checkpoint_every": 8,
    "sampling__num_samples": 1,
    "sampling__batch_size": 8,
}


def by_hand():
    """Five steps on all devices: the losses, and a sum of each array of weights."""
    mesh = sharding.data_mesh()
    everywhere = sharding.replicated(mesh)
    model = UNet(
        channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        num_groups=4,
        dropout=0.1,
    )
    schedule, optimizer = schedules.linear(100), adam(1e-3, grad_clip=1.0)
    state = jax.jit(lambda: init(model, optimizer, (8, 8, 1), 0), out_shardings=everywhere)()
    metrics = jax.jit(Metrics.zero, out_shardings=everywhere)()
    step = jax.jit(
        make_train_step(model, simple(schedule), optimizer, ema_decay=0.9, seed=0),
        in_shardings=(everywhere, everywhere, sharding.split_batch(mesh)),
        out_shardings=everywhere,
        donate_argnums=(0, 1),
    )
    losses = []
    for i in range(5):
        images = np.random.default_rng(i).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
        batch = sharding.to_devices(mesh, images)
        assert len(batch.sharding.device_set) == jax.device_count()
        state, metrics = step(state, metrics, batch)
        losses.append(float(metrics.loss))
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    sums = jax.jit(lambda params: [jnp.abs(x).sum() for x in jax.tree.leaves(params)])
    return losses, [float(x) for x in sums(state.params)]


def train_all(folder):
    """All that is compared, by the devices of this process."""
    found = {"devices": jax.device_count(), "by hand": by_hand()}
    for name, objective in OBJECTIVES.items():
        done = runs.run(runs.command(folder / name, **objective, **SMALL))
        assert done.returncode == 0, done.stderr
        assert f"{jax.device_count()} x " in done.stdout + done.stderr
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
        found[name] = [[line["loss"], line["grad_norm"]] for line in lines if "loss" in line]
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one device and what eight come to: all by one process for each number of devices."""
    by_devices = {}
    for devices in (1, 8):
        folder = tmp_path_factory.mktemp(f"{devices}_devices")
        if jax.default_backend() == "cpu" and jax.device_count() == devices:
            train_all(folder)
        else:
            done = subprocess.run(
                [sys.executable, "-m", "tests.test_sharding", str(folder)],
                env=runs.environment(JAX_NUM_CPU_DEVICES=str(devices)),
                cwd=runs.ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
        by_devices[devices] = json.loads((folder / "found.json").read_text())
    return by_devices


def test_eight_devices_train_as_one_does(found):
    assert (found[1]["devices"], found[8]["devices"]) == (1, 8)
    one, eight = found[1]["by hand"], found[8]["by hand"]
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    # Biases without a gradient (of attention keys) hold rounding errors, made large by Adam.
    np.testing.assert_allclose(eight[1], one[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_eight_devices_train_any_objective_as_one_does(name, found):
    assert len(found[1][name]) == 8
    np.testing.assert_allclose(found[8][name], found[1][name], rtol=1e-4)


def test_batch_that_does_not_divide_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.setattr(sharding.jax, "device_count", lambda: 8)
    sharding.check_batch_size(64, "training.batch_size")
    with pytest.raises(InputError, match=r"training.batch_size = 60.*devices, 8.*nearest is 64"):
        sharding.check_batch_size(60, "training.batch_size")


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))

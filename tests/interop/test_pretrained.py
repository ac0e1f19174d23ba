"""The weights that come with the library: small, of the config they name, and good to sample."""

import jax
import numpy as np
import pytest
from safetensors import safe_open

import ddpm
from ddpm.data.sources import digits
from ddpm.diffusion.pixels import to_float
from ddpm.errors import InputError
from ddpm.interop import weights

NAMES = weights.shipped()


def test_files_are_small_and_in_float16():
    assert {"digits", "fashion_mnist"} <= set(NAMES)
    for path in NAMES.values():
        assert path.stat().st_size < 2e6
        with safe_open(path, "np") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {np.dtype("float16")}  # noqa: SIM118


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_loads_weights_that_denoise(name, tmp_path, monkeypatch):
    """The prediction of x_0 has less than a third of the squared error that x_t has."""
    model = ddpm.load(name)
    height, width, channels = model.image_shape
    x_0 = -np.ones((8, height, width, channels), np.float32)
    if name == "digits":
        x_0 = to_float(digits("test").read(np.arange(8)).image)
    else:  # a bag, if anything
        x_0[:, height // 4 : -height // 4, width // 4 : -width // 4] = 0.8
    t = jax.numpy.full(8, model.schedule.num_steps // 3)
    eps = jax.random.normal(jax.random.key(0), x_0.shape)
    x_t = ddpm.q_sample(model.schedule, x_0, t, eps)
    found = jax.jit(model.denoiser)(x_t, t).x_0
    without = float(jax.numpy.exp(-model.schedule.log_snr[t[0]]))
    assert float(((found - x_0) ** 2).mean()) < 0.3 * without
    # A file or folder of that name goes first.
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"neither config\.json nor"):
        ddpm.load(name)


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(InputError, match="the library's own weights are digits, fashion_mnist"):
        ddpm.load("digitz")

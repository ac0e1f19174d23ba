"""ddpm.load: from a run folder, or weights of others, to the samples that the command draws."""

import ast
import importlib
import json

import jax
import numpy as np
import pytest

import ddpm
from ddpm.build.experiment import build
from ddpm.build.network import check_model
from ddpm.config import default, to_json
from ddpm.config.same_run import saved_config
from ddpm.diffusion.pixels import to_uint8
from ddpm.errors import InputError
from ddpm.interop import weights
from tests.runs import ROOT, command, run


@pytest.fixture(scope="module")
def model(shared_run):
    return ddpm.load(shared_run)


def test_samples_are_those_of_the_command(module_run, model):
    """In batches of four: five samples, by a typed key and an old one."""
    done = run(command(module_run, "--mode=sample", sampling__seed=3))
    assert done.returncode == 0, done.stderr
    (path,) = (module_run / "samples").glob("*_seed3_n5.npz")
    with np.load(path) as file:
        expected = file["images"]
    x = model.sample(jax.random.key(3), 5)
    assert x.dtype == np.float32
    assert x.shape == (5, *model.image_shape) == (5, 8, 8, 1)
    assert (to_uint8(x) == expected).all()
    assert (model.sample(jax.random.PRNGKey(3), 5) == x).all()
    assert (model.sample(jax.random.key(4), 5) != x).any()
    assert ddpm.show(x).tobytes() == ddpm.show(expected).tobytes()


def test_sampler_by_name_by_function_and_by_its_parts(model):
    """All draw the same; the schedule and the denoiser are those that it samples with."""
    key = jax.random.key(0)
    x = model.sample(key, 3, sampler="ddim", steps=4)
    given = model.sample(key, 3, sampler=ddpm.ddim(steps=4))
    apart = ddpm.sample(
        key, model.schedule, model.denoiser, (3, 8, 8, 1), sampler=ddpm.ddim(steps=4)
    )
    np.testing.assert_allclose(given, x, atol=1e-6)
    np.testing.assert_allclose(apart, x, atol=1e-5)
    assert (model.sample(key, 3, sampler=ddpm.ddim(), times=[20, 15, 10, 5, 0]) == given).all()
    assert model.config.sampling.sampler == "ancestral"  # as before


def test_weights_and_defaults_are_chosen_on_loading(shared_run, model):
    last = ddpm.load(f"{shared_run}/", ema=False, sampler="ddim", steps=4)
    assert "not averaged" in repr(last)
    assert "averaged (EMA)" in repr(model)
    assert last.config.sampling.steps == 4
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), last.params, model.params)
    assert any(jax.tree.leaves(moved))
    assert model.config.to_json() == saved_config(to_json(model.config)).to_json()
    assert to_json(model.config) == json.loads((shared_run / "config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"stps": 5}, InputError, "'stps' is no key of config.sampling; did you mean 'steps'"),
        ({"steps": 0.5}, InputError, "config.sampling.steps = 0.5"),
        ({"steps": 21}, InputError, "must be at most T = 20"),
        ({"sampler": "dim"}, InputError, "did you mean 'ddim'"),
        ({"sampler": 5}, TypeError, "sampler is 5: must be a name, or made as"),
        ({"sampler": ddpm.ddim(steps=5), "steps": 5}, InputError, "has its own steps"),
        ({"ema": False}, InputError, "ddpm.load"),
        ({"seed": 1}, InputError, "'seed' is no key"),
        ({"guidance_scale": 2}, InputError, "guidance_scale = 2.0: the model has no labels"),
        ({"guidance_scale": 2, "sampler": ddpm.ddim()}, InputError, "the model has no labels"),
        ({"num_samples": 0}, ValueError, "must be a whole number >= 1"),
        ({"num_samples": 2.0}, ValueError, "must be a whole number >= 1"),
        ({"key": 0}, TypeError, "key"),
    ],
)
def test_what_cannot_be_sampled(model, settings, error, said):
    arguments = {"key": jax.random.key(0), "num_samples": 2} | settings
    if settings == {"seed": 1}:
        arguments["seed"] = 1
    with pytest.raises(error, match=said):
        model.sample(**arguments)


def test_what_cannot_be_loaded(tmp_path, shared_run):
    with pytest.raises(InputError, match="there is no such file or folder"):
        ddpm.load(tmp_path / "none.safetensors")
    with pytest.raises(
        InputError, match=r"'emma' is no key of config.sampling; did you mean 'ema'"
    ):
        ddpm.load(shared_run, emma=False)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"no checkpoint in .*: the run has saved none yet"):
        ddpm.load(tmp_path)


def test_weights_of_others(tmp_path):
    """With the settings that come with them."""
    config = default()
    config.model.update(
        channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(),
        num_groups=4,
    )  # fmt: skip
    config.diffusion.update(schedule="cosine", num_steps=20)
    built = build(config, (8, 8, 1))
    rng = np.random.default_rng(0)
    shapes = check_model(built.model, built.image_shape)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    weights.export(tmp_path / "ours.safetensors", built, params)
    found = ddpm.load(tmp_path / "ours.safetensors")
    assert found.image_shape == (8, 8, 1)
    assert found.config.model.channels == 8
    np.testing.assert_allclose(found.schedule.log_snr, built.schedule.log_snr, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_super_resolution_has_no_denoiser_of_its_own(model):
    config = model.config.copy_and_resolve_references()
    config.model.low_resolution = 4
    enlarging = type(model)(
        model._run._replace(built=model._run.built._replace(config=config)), model._workdir
    )
    with pytest.raises(InputError, match="low_resolution_images"):
        _ = enlarging.denoiser


@pytest.mark.parametrize("file", ["cifar10_edm", "fashion_mnist", "cifar10_vdm"])
def test_config_of_a_run_is_what_it_was(file):
    """Tuples too, which JSON does not have; a key that a run of before lacks has its default."""
    config = importlib.import_module(f"configs.{file}").get_config()
    config.sampling.times = (1000, 500.5, 0)
    saved = to_json(config)
    assert saved_config(saved) == config
    del saved["sampling"]["grid"]
    config.sampling.grid = default().sampling.grid
    assert saved_config(saved | {"gone": {"key": 1}}) == config


def test_importing_stays_light():
    """What `import ddpm` imports at once: no file of PIL's, no Orbax, no build."""
    tree = ast.parse((ROOT / "ddpm" / "__init__.py").read_text())
    rooms = {f"{n.module}.{n.names[0].name}".split(".")[1] for n in tree.body
             if isinstance(n, ast.ImportFrom) and n.module.startswith("ddpm")}  # fmt: skip
    assert rooms == {"diffusion", "energy", "models", "sampling", "version"}
    assert {"load", "show", "__version__"} <= {*ddpm.__all__} & {*dir(ddpm)}
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = ddpm.laod

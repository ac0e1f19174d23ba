"""Weights of ours for others: the real commands, and diffusers sampling what they wrote."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm.build import experiment
from ddpm.config import default
from ddpm.data.sources import npz
from ddpm.diffusion.streams import sample_keys
from ddpm.errors import InputError
from ddpm.interop import weights
from ddpm.modes.export import export
from ddpm.sampling.samplers import times
from tests.interop.theirs import SCALE_SHIFT, UNETS, give_noise, make, save
from tests.runs import UNET, command, final_state, run

T = 20
OURS = UNET | {
    "model__channel_multipliers": "(1,2)",
    "model__attention_resolutions": "(4,)",
    "model__head_channels": 8,
    "diffusion__schedule": "cosine",
    "training__learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run, what was exported of it, average/, raw/ and average.safetensors, and what was said."""
    folder = tmp_path_factory.mktemp("export")
    ok(command(folder / "run", **OURS))
    for out, options in (
        ("average", {}),
        ("average.safetensors", {}),
        ("raw", {"sampling__ema": False, "sampling__variance": "fixed_small"}),
    ):
        said = ok(command(folder / "run", "--mode=export", f"--out={folder / out}", **OURS,
                          **options)).stderr  # fmt: skip
        (folder / f"{out}.txt").write_text(said)
    return folder


def ok(arguments):
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    return done


def fails(arguments, said):
    done = run(arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("error:") == 1
    return done


def bytes_of(path):
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_import_export_import_gives_equal_bytes(workdir):
    first = weights.load(workdir / "average")
    built = experiment.build(first.config, first.image_shape)
    for out in ("again", "again.safetensors"):
        weights.export(workdir / out, built, first.params)
        again = weights.load(workdir / out)
        jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
        assert again.config == first.config
        assert again.sha256 == first.sha256
        assert bytes_of(workdir / out) == bytes_of(workdir / out.replace("again", "average"))
    # From the file to a folder, by the command.
    ok(command(workdir / "other", "--mode=export", f"--out={workdir / 'third'}",
               f"--init_from={workdir / 'average.safetensors'}"))  # fmt: skip
    assert bytes_of(workdir / "third") == bytes_of(workdir / "average")


def test_noise_left_by_few_steps_is_reported(workdir):
    said = {out: (workdir / f"{out}.txt").read_text() for out in ("average", "raw")}
    assert "export again with --config.sampling.variance=fixed_small" in said["average"]
    assert "fixed_small" not in said["raw"]
    assert "fixed_small" not in (workdir / "average.safetensors.txt").read_text()
    scheduler = json.loads((workdir / "raw/scheduler/scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "fixed_small"


@pytest.mark.parametrize("kind", ["fixed_large", "fixed_small"])
def test_the_last_of_few_steps_of_diffusers_adds_noise_if_large(kind):
    """The reason of what is reported."""
    scheduler = DDPMScheduler(variance_type=kind, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    last = scheduler.timesteps[-1]
    assert last > 0
    std = float(scheduler._get_variance(last)) ** 0.5
    assert std > 0.2 if kind == "fixed_large" else std < 1e-9


@pytest.mark.parametrize("options", [{}, SCALE_SHIFT], ids=["default", "scale_shift"])
def test_weights_of_others_come_back_as_they_were(tmp_path, options):
    """Through this library and back to diffusers: tensor by tensor, and the settings."""
    net = make(UNETS["small_theirs"] | options)
    found = weights.load(save(net, tmp_path / "theirs", beta_schedule="scaled_linear"))
    built = experiment.build(found.config, found.image_shape)
    weights.export(tmp_path / "ours", built, found.params)
    back = DDPMPipeline.from_pretrained(tmp_path / "ours")
    state = back.unet.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
    ignored = ("dropout", "_use_default_values", "_name_or_path", "_diffusers_version")
    settings = dict(back.unet.config)
    for key, value in net.config.items():
        if key not in ignored:
            same = list(value) if isinstance(value, tuple) else value
            assert settings[key] == same, key
    assert back.scheduler.config.beta_schedule == "scaled_linear"
    assert back.scheduler.config.variance_type == "fixed_large"  # of our config


def test_the_average_and_the_last_weights(workdir):
    _, arrays = final_state(workdir / "run")  # the average, the optimiser's state, the weights
    for name in ("average", "raw"):
        for x in jax.tree.leaves(weights.load(workdir / name).params):
            assert any(x.shape == y.shape and (x == y).all() for y in arrays)
    assert weights.load(workdir / "raw").sha256 != weights.load(workdir / "average").sha256


def test_diffusers_gives_our_samples_from_the_same_noise(workdir, monkeypatch):
    """Those that --mode=sample draws, of the averaged weights, to the last 8-bit value but one."""
    keys = sample_keys(jax.random.key(0), np.arange(5))
    for sampler, pipeline_class, steps, options in (
        ({}, DDPMPipeline, T, {}),
        (
            {"sampling__sampler": "ddim", "sampling__steps": 5, "sampling__eta": 0.5},
            DDIMPipeline,
            5,
            {"eta": 0.5, "use_clipped_model_output": True},
        ),
    ):
        done = ok(command(workdir / "run", "--mode=sample", **OURS, **sampler))
        samples = npz(done.stdout.split()[0]).image
        pipeline = pipeline_class.from_pretrained(workdir / "average")
        pipeline.set_progress_bar_config(disable=True)
        with monkeypatch.context() as patch:
            give_noise(patch, keys, times(T, steps), (8, 8, 1))
            found = pipeline(5, num_inference_steps=steps, output_type="np", **options).images
        found = np.round(found.reshape(samples.shape) * 255)
        off = np.abs(found - samples.astype(float))
        assert samples.std() > 20
        assert off.max() <= 1
        assert (off > 0).mean() < 0.05


def test_one_file_is_read_by_others_too(workdir):
    from safetensors.torch import load_file

    net = UNet2DModel.from_pretrained(workdir / "average" / "unet")
    net.load_state_dict(load_file(workdir / "average.safetensors"), strict=True)


def test_sampling_and_evaluating_weights_of_others(workdir, tmp_path):
    given = f"--init_from={workdir / 'average'}"
    theirs = ok(command(tmp_path / "a", "--mode=sample", given, diffusion__num_steps=1000))
    ours = ok(command(workdir / "run", "--mode=sample", **OURS))
    path, expected = (done.stdout.split()[0] for done in (theirs, ours))
    digest = weights.load(workdir / "average").sha256[:8]
    assert f"weights_{digest}_ancestral20_fixed_large_seed0_n5.npz" in path
    np.testing.assert_array_equal(npz(path).image, npz(expected).image)
    # Nothing of the config given was taken for the settings of the weights.
    assert "config.diffusion.num_steps = 20" in theirs.stderr
    options = {"evaluation__parts": "('bound',)", "evaluation__bound_images": 20}
    ok(command(tmp_path / "a", "--mode=evaluate", given, **options))
    ok(command(workdir / "run", "--mode=evaluate", **OURS, **options))
    found, expected = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in (tmp_path / "a", workdir / "run")
    )
    assert found["bound"] == expected["bound"]
    assert digest in found["weights"]
    assert found["config"]["diffusion"]["schedule"] == "cosine"


def test_training_goes_on_from_weights_of_others(workdir, tmp_path):
    given = f"--init_from={workdir / 'average'}"
    # A step of no length leaves the weights as they were.
    options = {"training__steps": 2, "training__learning_rate": 1e-30, "data__name": "digits"}
    first = ok(command(tmp_path / "run", given, **options))
    assert "from weights" in first.stderr
    out = tmp_path / "out"
    ok(command(tmp_path / "run", "--mode=export", f"--out={out}", **OURS | options))
    expected, found = weights.load(workdir / "average"), weights.load(out)
    for x, y in zip(*map(jax.tree.leaves, (found.params, expected.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-20)
    # The same command goes on from the checkpoint, not from the weights.
    again = ok(command(tmp_path / "run", given, **options | {"training__steps": 3}))
    assert "resuming at step 2" in again.stderr
    # And from no other weights.
    other = f"--init_from={workdir / 'raw'}"
    fails(command(tmp_path / "run", other, **options), "holds a run that did not begin from --init")


def test_what_is_refused(workdir, tmp_path):
    ours = workdir / "run"
    out = workdir / "average"
    before = bytes_of(out)
    fails(command(ours, "--mode=export", f"--out={out}", **OURS), "there is something already")
    (tmp_path / "file").touch()
    nowhere = f"--out={tmp_path / 'file' / 'out'}"
    fails(command(ours, "--mode=export", nowhere, **OURS), "cannot be written")
    if Path("/proc/self").exists():  # where not even the superuser can write
        nowhere = "--out=/proc/weights.safetensors"
        fails(
            command(ours, "--mode=export", nowhere, **OURS), "/proc/weights.safetensors: cannot be"
        )
    fails(
        command(ours, f"--out={out}", **OURS),
        "--mode=export, sample, edit, compare, evaluate, compress, decompress alone",
    )
    fails(command(ours, "--mode=reference", "--init_from=x"), "uses no weights")
    for path, said in (
        ("", "--mode=export needs --out"),
        (f"{out}.safetensors", "there is something already"),
        (f"{out}.bin", "must be a folder, or end in"),
        (tmp_path / "new", "no checkpoint"),
    ):
        with pytest.raises(InputError, match=said):
            export(default(), tmp_path / "none", str(path))
    measured = default()
    measured.sampling.variance = "analytic"
    with pytest.raises(InputError, match="no file has a place for it"):
        export(measured, tmp_path / "none", str(tmp_path / "new"))
    save(make(UNETS["small"]), tmp_path / "colour")
    fails(command(tmp_path / "new", f"--init_from={tmp_path / 'colour'}"), "is of images (8, 8, 3)")
    assert not (tmp_path / "new").exists()
    assert bytes_of(out) == before


def test_the_papers_settings_are_written_as_published(tmp_path):
    """config.json of the published CIFAR-10 weights, key by key."""
    from ddpm.interop.settings import to_unet_config

    found = to_unet_config(default(), (32, 32, 3))
    for key, value in UNETS["cifar10"].items():
        assert found[key] == (list(value) if isinstance(value, tuple) else value), key

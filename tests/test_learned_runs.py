"""A schedule that is learned, and averages of two widths, by the real commands."""

import json
import shutil

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import digits
from ddpm import likelihood
from ddpm.build import experiment
from ddpm.build.checks import validate
from ddpm.build.data import held_out
from ddpm.build.schedule import noise_schedule
from ddpm.data.sources import npz
from ddpm.diffusion.pixels import to_float
from ddpm.errors import InputError
from ddpm.interop import settings, weights
from ddpm.modes.evaluate import evaluate
from ddpm.modes.export import export
from ddpm.modes.loading import load_run
from ddpm.modes.train import train
from ddpm.training import ema
from ddpm.training.objectives import LEARNED_SCHEDULE
from tests.exact import close
from tests.runs import command, final_state, run

OPTIONS = {
    "diffusion__schedule": "learned",
    "diffusion__prediction": "v",
    "model__noise_input": "log_snr",
    "training__loss": "continuous_bound",
    "training__ema": "power",
    "training__ema_relative_stds": "(0.1, 0.05)",
    "training__ema_snapshot_every": 3,
    "training__learning_rate": 0.01,  # the end points move by this at each step
    "training__checkpoint_every": 4,
}
ENDS = ("log_snr_0", "log_snr_1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps."""
    workdir = tmp_path_factory.mktemp("learned") / "run"
    done = run(command(workdir, **OPTIONS))
    assert done.returncode == 0, done.stderr
    return workdir


def config_of(workdir, **changes):
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def loaded(workdir, **changes):
    return load_run(config_of(workdir, **changes), workdir, "sample")


def averages(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "averages").iterdir()}


def names(*steps):
    return {f"step_{step:08}_std{std}.npz" for step in steps for std in (0.05, 0.1)}


def test_the_schedule_moved_and_is_what_the_run_samples_by(whole):
    assert set(averages(whole)) == names(3, 6, 8)
    raw, averaged = loaded(whole, sampling__ema=False), loaded(whole)
    begin = experiment.build(config_of(whole), (8, 8, 1))
    assert begin.schedule.log_snr[1] == np.float32(13.3)
    for found in (raw, averaged):
        ends = [float(found.params[LEARNED_SCHEDULE][name]) for name in ENDS]
        close(found.built.schedule.log_snr[np.array([1, 20])], ends, rtol=1e-6)
        assert all(
            0.01 < abs(end - start) < 0.1 for end, start in zip(ends, (13.3, -5), strict=True)
        )
    assert raw.params[LEARNED_SCHEDULE]["height"].shape == (64,)
    # The network is read by it too: given the noise as it is there.
    denoisers = [built.objective.denoiser(lambda x, t: t[:, None] + 0 * x) for built in
            (raw.built, begin)]  # fmt: skip
    x_t, t = np.zeros((1, 2), np.float32), np.array([20])
    now, before = (denoise(x_t, t).eps.max() for denoise in denoisers)  # alpha times its input
    assert abs(now / before - 1) > 1e-3


def test_resumed_it_ends_in_the_same_weights_averages_and_snapshots(whole, tmp_path):
    """Also if snapshots are kept more often from there on, which changes no weights."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    # Of a step that is taken again, and would not belong to it had the learning rate been changed.
    (workdir / "averages" / "step_00000007_std0.1.npz").write_text("")
    done = run(command(workdir, **OPTIONS | {"training__ema_snapshot_every": 2}))
    assert done.returncode == 0, done.stderr
    assert "resuming at step 4" in done.stderr
    (step, found), (last, expected) = final_state(workdir), final_state(whole)
    assert step == last == 8
    # params, two averages and Adam's two moments, each with the five parts of the schedule.
    assert sum(a.shape == (64,) for a in expected) >= 5 * 3
    for a, b in zip(found, expected, strict=True):
        assert a.tobytes() == b.tobytes()
    now = averages(workdir)
    assert set(now) == names(3, 6, 8)
    for name, data in averages(whole).items():
        assert now[name] == data, name


def test_kept_averages_are_those_of_the_checkpoint(whole):
    """Of both widths, the first being what samples are drawn by; the other is not the same."""
    _, arrays = final_state(whole)
    first = loaded(whole)
    for std, plain in ((0.1, True), (0.05, False)):
        with np.load(whole / "averages" / f"step_00000008_std{std}.npz") as file:
            kept = dict(file)
        params = flatten_dict(first.params, sep="/")
        assert kept.keys() == params.keys()
        assert all((kept[k] == params[k]).all() for k in kept) == plain
        for name, value in kept.items():
            assert any(a.shape == value.shape and (a == value).all() for a in arrays), name
        found = loaded(whole, sampling__ema_relative_std=std)
        for name, value in flatten_dict(found.params, sep="/").items():
            close(value, kept[name], rtol=1e-4, atol=1e-6)
        assert found.tag == f"step_00000008_std{std}"
        assert found.origin == f"step 8, averaged with width {std}, of 6 snapshots"
        assert plain or found.digest != first.digest


def test_samples_by_another_width(whole):
    done = run(command(whole, "--mode=sample", **OPTIONS, sampling__ema_relative_std=0.07))
    assert done.returncode == 0, done.stderr
    file = done.stdout.split()[0]
    assert file.endswith("step_00000008_std0.07_ancestral20_fixed_large_seed0_n5.npz")
    samples = npz(file).image.astype(int)
    assert samples.shape == (5, 8, 8, 1)
    # By the factors that are nearest to the width, of the files and of their schedules.
    kept = sorted((whole / "averages").iterdir())
    profiles = [ema.Profile(int(p.name[5:13]), ema.power_of(float(p.stem[17:]))) for p in kept]
    factors = ema.reconstruction(profiles, ema.Profile(8, ema.power_of(0.07)))
    arrays = [np.load(path) for path in kept]
    found = loaded(whole, sampling__ema_relative_std=0.07)
    for name, value in flatten_dict(found.params, sep="/").items():
        parts = (f * np.float64(a[name]) for f, a in zip(factors, arrays, strict=True))
        close(value, sum(parts), rtol=1e-5, atol=1e-6)
    ends = [found.params[LEARNED_SCHEDULE][name] for name in ENDS]
    close(found.built.schedule.log_snr[np.array([1, 20])], ends, rtol=1e-6)
    drawn = found.generator(5).samples(found.params, 5, seed=0).astype(int)
    assert np.abs(drawn - samples).max() <= 1


def test_the_bound_is_that_of_the_learned_end_points(whole):
    evaluate(config_of(whole, evaluation__parts=("bound",), evaluation__bound_images=16), whole)
    found = json.loads((whole / "evaluation.json").read_text())["bound"]["held out"]
    found = {name: found[name]["bits_per_dim"] for name in ("total", "prior", "steps", "decoder")}
    close(found["total"], found["prior"] + found["steps"] + found["decoder"], rtol=1e-5)
    images = held_out(config_of(whole)).read(np.arange(16)).image
    begin, learned = noise_schedule(config_of(whole)), loaded(whole).built.schedule
    before, now = (likelihood.prior_kl(s, to_float(images)).mean() for s in (begin, learned))
    close(found["prior"], now, rtol=1e-3)
    assert abs(before / now - 1) > 0.01


# --- What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"training__ema_snapshot_every": 5},
            r"ema_snapshot_every = 5: goes with config.training.ema = 'power'",
        ),
        (
            {"sampling__ema_relative_std": 0.29},
            r"ema_relative_std = 0.29: must be 0 or in \(0, 0.28",
        ),
        (
            {"sampling__ema_relative_std": -0.1},
            r"ema_relative_std = -0.1: must be 0 or in \(0, 0.28",
        ),
        (
            {"sampling__ema_relative_std": 0.1, "sampling__ema": False, "training__ema": "power"},
            r"ema_relative_std = 0.1: goes with config.sampling.ema = True and config.training.ema",
        ),
        ({"sampling__ema_relative_std": 0.1}, r"goes with .* config.training.ema = 'power'"),
        ({"training__ema_relative_stds": ()}, r"stds = \(\): must be a tuple of different numbers"),
        ({"training__ema_relative_stds": (0.1, 0.1)}, r"must be a tuple of different numbers"),
        ({"training__ema_relative_stds": (0.05, 0.3)}, r"must be .* numbers in \(0, 0.28\]"),
        ({"training__ema": "powers"}, r"one of constant, warm_up, half_life, power; did you mean"),
        ({"diffusion__schedule": "learnt"}, r"did you mean 'learned'"),
        ({"diffusion__log_snr_0": 31.0}, r"log_snr_0 = 31.0: must be in \[-30, 30\]"),
        ({"diffusion__reference_resolution": -1}, r"must be a whole number >= 0"),
    ],
)
def test_a_wrong_value_is_named(changes, said):
    config = digits.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with pytest.raises(InputError, match=said) as error:
        validate(config)
    assert "\n" not in str(error.value)


def refused(said, *arguments, load=load_run):
    with pytest.raises(InputError, match=said) as error:
        load(*arguments)
    assert "\n" not in str(error.value)


def test_a_width_without_its_snapshots(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    config = config_of(whole, sampling__ema_relative_std=0.07)
    ours = loaded(workdir, sampling__ema_relative_std=0.07)
    (workdir / "averages" / "step_00000003_std0.1.npz").unlink()
    other = load_run(config, workdir, "sample")
    assert "of 5 snapshots" in other.origin
    assert other.tag == ours.tag
    assert other.digest != ours.digest
    config.sampling.ema_relative_std = 0.01
    refused(r"0.01: the snapshots in .* make it no better than to", config, workdir, "sample")
    config.sampling.ema_relative_std = 0.07
    (workdir / "averages" / "step_00000006_std0.1.npz").write_text("")
    refused(r"step_00000006_std0.1.npz: cannot be read", config, workdir, "sample")
    shutil.rmtree(workdir / "averages")
    refused(r"no averages in .* up to step 8: train with", config, workdir, "sample")
    refused("is made of a run's own averages, and --init_from", config, workdir, "sample", "there")


def test_other_widths_are_another_run(whole, tmp_path):
    config = config_of(whole, training__ema_relative_stds=(0.1, 0.2))
    refused(r"holds a run with config.training.ema_relative_stds = \[0.1, 0.05\]", config, whole,
            load=train)  # fmt: skip


def test_weights_of_others_and_for_others(whole, tmp_path):
    config = config_of(whole)
    said = "schedule = 'learned': the weights of others come without a schedule"
    refused(said, config, tmp_path / "new", "theirs.safetensors", load=train)
    refused(said, "theirs.safetensors", config, load=weights.load)
    assert not (tmp_path / "new").exists()
    out = tmp_path / "out"
    said = "such a network can be neither exported"
    refused(f"name = 'dit': {said}", config, whole, str(out), load=export)
    config.model.name = "unet"
    refused(f"noise_input = 'log_snr': {said}", config, load=settings.check_network)
    assert not out.exists()

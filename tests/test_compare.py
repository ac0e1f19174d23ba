"""The real `main.py --mode=compare`, and what it refuses."""

import json

import numpy as np
import pytest

from ddpm.build.experiment import build
from ddpm.config import default
from ddpm.errors import InputError
from ddpm.modes.compare import parse
from tests.page import check
from tests.runs import command, run

# On the digits' own classifier; a batch of 32 leaves three to be timed.
FEW = {"comparison__num_samples": 100, "sampling__batch_size": 32}


@pytest.fixture(scope="module")
def trained(module_run):
    return module_run


def test_table_and_plot(trained):
    heun, ancestral = "heun grid=karras steps=3", "ancestral variance=analytic steps=3"
    flow = "probability_flow tolerance=0.01"
    found = run(
        command(
            trained,
            "--mode=compare",
            comparison__samplers=f"('ddim','{heun}','{ancestral}','{flow}')",
            comparison__steps="(3, 6)",
            sampling__analytic_images=5,
            **FEW,
        )
    )
    assert found.returncode == 0, found.stderr
    result = json.loads((trained / "comparison.json").read_text())
    names = [(row["name"], row["steps"], row["evaluations"]) for row in result["rows"][:-1]]
    assert names == [("ddim", 3, 3), ("ddim", 6, 6), (heun, 3, 5), (ancestral, 3, 3)]
    assert result["rows"][-1]["name"] == flow
    assert result["rows"][-1]["evaluations"] > 10
    for row in result["rows"]:
        assert row["frechet_distance"] > result["floor"] > 0
        assert row["seconds"] > 0
    page = check((trained / "comparison.html").read_text(encoding="utf-8"))
    assert page.headings == ["Samplers", "The run"]
    assert len(page.sources) == 4  # two plots, the samples, and the run's loss
    assert "Fréchet distance\xa0↓" in page.words
    assert "heun grid=karras" in found.stdout
    # Measured once, and kept with the run.
    (moments,) = (trained / "moments").glob("*.npz")
    with np.load(moments) as file:
        kept = file["moments"]
    assert kept.shape == (21,)
    assert found.stderr.count("measuring the optimal variance") == 1


def test_sampling_by_the_kept_variance(trained):
    how = {"sampling__variance": "analytic", "sampling__analytic_images": 5}
    made = not list((trained / "moments").glob("*.npz"))
    found = run(command(trained, "--mode=sample", **how))
    assert found.returncode == 0, found.stderr
    assert ("measuring" in found.stderr) == made
    (moments,) = (trained / "moments").glob("step_00000008_n5_*.npz")
    assert (trained / "samples" / "step_00000008_ancestral20_analytic_seed0_n5.npz").exists()
    moments.write_bytes(moments.read_bytes()[:50])
    # Another sampler has it too, for what is evaluated.
    found = run(command(trained, "--mode=sample", **how, sampling__sampler="ddim"))
    assert found.returncode == 2
    assert f"{moments}: cannot be read" in found.stderr
    assert "Traceback" not in found.stderr
    moments.unlink()


def test_a_sampler_that_diverges_is_a_row_without_figures(trained):
    """Of noise that overflows; the others are measured."""
    found = run(
        command(
            trained,
            "--mode=compare",
            comparison__samplers="('heun churn=9 churn_noise=1e38','ddim')",
            comparison__steps="(2,)",
            **FEW,
        )
    )
    assert found.returncode == 0, found.stderr
    assert "are not finite" in found.stderr
    first, second = json.loads((trained / "comparison.json").read_text())["rows"]
    assert first["frechet_distance"] is first["seconds"] is None
    assert second["frechet_distance"] > 0


def test_samplers_are_steered_as_the_model_can_be(trained):
    found = run(
        command(
            trained,
            "--mode=compare",
            comparison__samplers="('ddim guidance_scale=2.0',)",
            comparison__steps="(2,)",
        )
    )
    assert found.returncode == 2
    assert "'ddim guidance_scale=2.0': config.sampling.guidance_scale = 2.0: the" in found.stderr


def test_a_variance_that_is_not_measured_yet_is_not_trained_with(tmp_path):
    found = run(command(tmp_path / "new", sampling__variance="analytic"))
    assert found.returncode == 2
    assert "is measured on a trained run" in found.stderr


@pytest.mark.parametrize(
    ("diffusion", "sampling", "said"),
    [
        ({"schedule": "jsd"}, {"sampler": "heun"}, "begin below"),
        ({"schedule": "jsd"}, {"sampler": "langevin"}, "begin below"),
        ({"schedule": "jsd"}, {"sampler": "probability_flow"}, "no end in log-SNR"),
        ({"prediction": "posterior_mean"}, {"grid": "karras", "steps": 9}, "between whole times"),
        ({"prediction": "posterior_mean"}, {"sampler": "probability_flow"}, "between whole times"),
    ],
)
def test_samplers_that_the_model_cannot_have(diffusion, sampling, said):
    config = default()
    config.diffusion.update({"prediction": "v"} | diffusion)
    config.sampling.update(sampling)
    with pytest.raises(InputError, match=said):
        build(config, (32, 32, 3))
    config.sampling.update(sampler="dpm_solver", grid="uniform", steps=9)
    build(config, (32, 32, 3))


def entries(**comparison):
    config = default()
    config.comparison.update(comparison)
    return parse(config)


def test_entries():
    found = entries(
        samplers=(
            "ddim",
            "dpm_solver order=3 grid=karras rho=5",
            "heun steps=7",
            "euler times=(9,0)",
        ),
        steps=(4, 8),
    )
    assert [(e.name.split()[0], e.steps) for e in found] == [
        ("ddim", 4),
        ("ddim", 8),
        ("dpm_solver", 4),
        ("dpm_solver", 8),
        ("heun", 7),
        ("euler", 1),
    ]
    of = found[3].config.sampling
    assert (of.sampler, of.order, of.grid, of.rho, of.steps) == ("dpm_solver", 3, "karras", 5.0, 8)
    assert tuple(found[5].config.sampling.times) == (9, 0)


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("ddimm", "did you mean 'ddim'"),
        ("", "must be one of"),
        ("ddim etta=1", "'etta' is no key of config.sampling; did you mean 'eta'"),
        ("ddim eta", "no key of config.sampling"),
        ("ddim eta=2", r"must be in \[0, 1\]"),
        ("ddim eta=high", "must be of type float"),
        ("dpm_solver order=4", "must be 1, 2 or 3"),
        ("ddim steps=1001", "at most T = 1000"),
        ("ddim seed=3", "'seed' is no key"),
        ("ddim ema_relative_std=0.1", "'ema_relative_std' is no key"),
    ],
)
def test_entries_that_are_wrong(sampler, said):
    with pytest.raises(InputError, match=said) as found:
        entries(samplers=("ddim", sampler))
    assert f"config.comparison.samplers, {sampler!r}" in str(found.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("times", "(5,7,0)", "must fall, but after t = 5 comes 7"),
        ("times", "(25,0)", "t = 25 is not within T = 20..1, nor 0"),
        ("steps", "21", "must be at most T = 20"),
        ("sampler", "dpm_solver_2m", "did you mean 'dpm_solver'"),
        ("grid", "karas", "did you mean 'karras'"),
        ("churn_range", "(3,1)", "0 <= least < most"),
    ],
)
def test_settings_of_samplers_that_are_wrong(trained, key, value, said):
    before = sorted(trained.rglob("*"))
    found = run(command(trained, "--mode=sample", **{f"sampling__{key}": value}))
    assert found.returncode == 2
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert sorted(trained.rglob("*")) == before

"""--mode=evaluate as a user runs it: what it writes, and what it refuses without writing."""

import hashlib
import json

import numpy as np
import pytest

from ddpm.data import digits
from ddpm.training.checkpoints import saved_meta
from tests.page import check
from tests.runs import command, run

SMALL = {
    "evaluation__bound_images": 40,
    "evaluation__bound_times": 4,
    "evaluation__batch_size": 16,
    "evaluation__flow_images": 3,
    "evaluation__flow_tolerance": 1e-2,
    "evaluation__num_samples": 20,
    "evaluation__seeds": "(0,1)",
}


@pytest.fixture(scope="module")
def workdir(module_run):
    return module_run


def evaluate(workdir, *extra, **overrides):
    return run(command(workdir, "--mode=evaluate", *extra, **(SMALL | overrides)))


def test_everything_is_measured_and_written(workdir):
    done = evaluate(workdir)
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["step"] == 8
    assert found["weights"] == "ema"
    for split in ("held out", "train"):
        bound = found["bound"][split]
        assert bound["images"] == 40
        parts = sum(bound[k]["bits_per_dim"] for k in ("prior", "steps", "decoder"))
        assert bound["total"]["bits_per_dim"] == pytest.approx(parts)
        assert bound["total"]["standard_error"] > 0
        assert len(bound["L"]) == len(bound["rate"]) == len(bound["rmse"]) == 20
        assert np.all(np.diff(bound["rate"]) <= 0)
    flow = found["flow"]["uniform dequantisation"]
    assert flow["images"] == 3
    assert flow["evaluations"][0] > 10
    d = found["distances"]
    assert d["seeds"] == [0, 1]
    assert len(d["samples"]["frechet_distance"]["values"]) == 2
    assert d["samples"]["frechet_distance"]["std"] > 0
    # An untrained network draws noise: all that is measured tells it from digits.
    floor = d["floor"]["values"]
    assert d["floor"]["images"] == 20
    assert d["samples"]["frechet_distance"]["mean"] > 2 * floor["frechet_distance"]
    # Of 20 images the accuracy is coarse (real against real: 0.5, give or take 0.1).
    assert d["samples"]["two_sample_accuracy"]["mean"] > 0.7
    assert floor["two_sample_accuracy"] < 0.7
    assert sum(d["class_shares"]["train"]) == pytest.approx(1)
    train = digits("train").image
    index = found["neighbours"]["pixels"]["index"]
    distance = found["neighbours"]["pixels"]["distance"]
    # The name tells the weights too: a run begun anew in the folder is not judged by old samples.
    digests = saved_meta(workdir / "checkpoints")["digests"]["ema_params"]
    of_weights = hashlib.sha256(repr(digests).encode()).hexdigest()[:8]
    config = found["config"]
    about = json.dumps([of_weights, config["model"], config["diffusion"]])
    fingerprint = hashlib.sha256(about.encode()).hexdigest()[:8]
    name = f"step_00000008_ancestral20_fixed_large_seed0_n20_{fingerprint}.npz"
    with np.load(workdir / "samples" / name) as file:
        samples = file["images"].astype(float)
    of_all = np.sqrt(((samples[:12, None] - train[None]) ** 2).sum(axis=(2, 3, 4)))
    assert (of_all.argmin(axis=1) == index).all()
    np.testing.assert_allclose(of_all.min(axis=1), distance)

    page = check((workdir / "report.html").read_text(encoding="utf-8"))
    assert page.headings == [
        "The run",
        "Samples",
        "The variational bound",
        "Likelihood by the probability-flow ODE",
        "Distances of samples to data",
        "Nearest training images",
        "Chains",
    ]
    assert len(page.sources) >= 10
    assert page.alts[0].startswith("The loss in training")
    assert page.alts[1] == "The first 20 samples, seed 0, not selected."
    for words in (
        f"Evaluation of {workdir.name}",
        "sampling.sampler",
        "'ancestral'",
        "samples 0, 1",
        "training.learning_rate",
        "NLL ≤",
        "LT−1",
        "Fréchet distance\xa0↓",
        "recall, k = 3\xa0↑",
    ):
        assert words in page.words, words
    assert f"{found['bound']['train']['total']['bits_per_dim']:.4f}" in done.stdout
    assert "floor" in done.stdout


def test_all_terms_of_all_images(workdir):
    """359 test images, in batches of 100: none is left out, none counted twice."""
    done = evaluate(
        workdir,
        evaluation__parts="('bound',)",
        evaluation__bound_images=0,
        evaluation__bound_times=0,
        evaluation__batch_size=100,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["bound"]["held out"]["images"] == 359
    assert found["bound"]["train"]["images"] == 1438
    assert "all T terms" in found["bound"]["train"]["how"]
    # No samples are drawn for it: the page shows those of training.
    assert "Samples drawn in training." in check((workdir / "report.html").read_text("utf-8")).alts
    assert set(found) & {"flow", "distances"} == set()


# Noise that overflows.
DIVERGING = {"sampling__sampler": "heun", "sampling__churn": 9.0, "sampling__churn_noise": 1e38}


def test_what_was_measured_is_written_where_a_part_fails(workdir):
    done = evaluate(
        workdir,
        evaluation__parts="('bound','distances')",
        **DIVERGING,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: distances: samples 0..3 are not finite")
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["bound"]["held out"]["images"] == 40
    assert "distances" not in found
    assert last == f"error: distances: {found['failed']['distances']}"


def save(path, images):
    np.savez(path, images=images)
    return path


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((30, 9, 8, 1), np.uint8), ".npz are (9, 8, 1) (height, width, channels)"),
        (np.zeros((19, 8, 8, 1), np.uint8), "19 images, config.evaluation.num_samples asks for 20"),
        (np.full((30, 8, 8, 1), np.nan, np.float32), "must be uint8 (0..255)"),
        (None, "there is no such file"),
        ("torn", "cannot be read as an .npz"),
    ],
)
def test_samples_that_cannot_be_judged_are_refused(workdir, tmp_path, images, said):
    path, report = tmp_path / "samples.npz", workdir / "evaluation.json"
    before = report.read_bytes() if report.exists() else None
    if isinstance(images, np.ndarray):
        save(path, images)
    elif images:
        save(path, np.zeros((30, 8, 8, 1), np.uint8))
        path.write_bytes(path.read_bytes()[:700])
    done = evaluate(workdir, evaluation__samples=path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert (report.read_bytes() if report.exists() else None) == before


def test_given_samples_are_judged(workdir, tmp_path):
    """Real images in the place of samples come out at the floor, and as copies of themselves."""
    path = save(tmp_path / "real.npz", digits("train").image[:40])
    done = evaluate(
        workdir,
        evaluation__samples=path,
        evaluation__num_samples=40,
        evaluation__parts="('distances','neighbours')",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["distances"]["samples"]["precision"]["mean"] == 1.0
    assert found["neighbours"]["pixels"]["index"] == list(range(12))
    assert max(found["neighbours"]["features"]["distance"]) < 1e-3


def test_without_held_out_data(workdir):
    """The flow is of training data, the floor of one half of them against the other."""
    parts = "('flow','distances')"
    done = evaluate(workdir, evaluation__split="", evaluation__parts=parts)
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["flow"]["uniform dequantisation"]["split"] == "train"
    floor = found["distances"]["floor"]
    assert (floor["images"], floor["of"]) == (20, "training images against 719 others")
    assert 5 * floor["values"]["frechet_distance"] < min(
        found["distances"]["samples"]["frechet_distance"]["values"]
    )
    assert "20 training images against 719 others" in done.stdout
    assert "train, 3 images" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"evaluation__parts": "('bond',)"}, "must be a tuple of some of bound, flow"),
        ({"evaluation__seeds": "()"}, "must be a tuple of different whole numbers"),
        ({"evaluation__split": "validation"}, "digits has no split 'validation'"),
        ({"evaluation__features": "fashion_mnist"}, "is for images of (28, 28, 1)"),
        ({"evaluation__features": "lpips"}, "must be one of '', digits, fashion_mnist, inception"),
        ({"evaluation__features": "inception"}, "pt_inception-2015-12-05-6726825d.pth"),
        (
            {"evaluation__features": "inception", "evaluation__inception_path": "/none.npz"},
            "/none.npz: there is no such file",
        ),
        ({"evaluation__inception_resize": "bicubic"}, "must be one of half_pixel, tf1"),
        ({"evaluation__num_samples": 4}, "a whole number >= 10"),
    ],
)
def test_wrong_settings_are_refused(workdir, overrides, said):
    done = evaluate(workdir, **overrides)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_without_a_run(tmp_path):
    done = evaluate(tmp_path / "none")
    assert done.returncode == 2
    assert "no checkpoint in" in done.stderr
    assert "--mode=evaluate" in done.stderr


def test_reference_needs_no_run(tmp_path, monkeypatch):
    """What it computes is what the cache then holds, and its floor is that of an evaluation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        done = run(command(tmp_path / "none", "--mode=reference"))
        assert done.returncode == 0, done.stderr
        assert "1,438 training images" in done.stdout
        assert "two-sample test, 1-NN" in done.stdout
    assert len(list((tmp_path / "cache" / "ddpm").glob("features-digits-*"))) == 2
    assert not (tmp_path / "none").exists()
    done = run(command(tmp_path / "none", "--mode=reference", evaluation__split="valid"))
    assert done.returncode == 2
    assert "digits has no split 'valid'" in done.stderr

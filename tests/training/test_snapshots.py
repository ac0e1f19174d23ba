"""Averages made of files afterwards against those computed directly; and files that are no good."""

import re

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from ddpm.errors import InputError
from ddpm.training import ema, snapshots
from tests.exact import close

STEPS, EVERY, KEPT = 400, 20, (0.05, 0.1)
LIKE = {
    "layer": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)},
    "log_snr": {"end": np.zeros(())},
}


def tree(flat):
    return {
        "layer": {"kernel": flat[:6].reshape(2, 3), "bias": flat[6:9]},
        "log_snr": {"end": flat[9].reshape(())},
    }


def flat(tree):
    layer, end = tree["layer"], tree["log_snr"]["end"]
    return np.concatenate([layer["kernel"].ravel(), layer["bias"], [end]])


@pytest.fixture(scope="module")
def walk():
    """Weights after each step, float64: they drift, so that averages of other widths differ."""
    return np.cumsum(np.random.default_rng(0).normal(0.05, 1, (STEPS, 10)), axis=0)


def gamma_of(relative_std):
    """Of tau^gamma on [0, 1], a beta distribution, the one with this standard deviation."""
    return optimize.brentq(lambda g: stats.beta(g + 1, 1).std() - relative_std, 0.01, 1e4)


def by_profile(walk, relative_std, step):
    """The average with the weight tau^gamma, of each step its integral over (step - 1, step)."""
    edges = (np.arange(step + 1) / step) ** (gamma_of(relative_std) + 1)
    return np.diff(edges) @ walk[:step]


@pytest.fixture(scope="module")
def folder(walk, tmp_path_factory):
    """By the recursion of a training, in float64, kept as float32."""
    folder = tmp_path_factory.mktemp("run") / "averages"
    averages, gammas = [walk[0] for _ in KEPT], [gamma_of(std) for std in KEPT]
    for step in range(1, STEPS + 1):
        for i, gamma in enumerate(gammas):
            decay = (1 - 1 / step) ** (gamma + 1)
            averages[i] = decay * averages[i] + (1 - decay) * walk[step - 1]
        if step % EVERY == 0:
            snapshots.save(folder, step, [tree(np.float32(a)) for a in averages], KEPT)
    return folder


@pytest.mark.parametrize("step", [STEPS, STEPS - 1, 200])
@pytest.mark.parametrize("relative_std", [0.03, 0.05, 0.07, 0.1, 0.14, 0.2])
def test_any_width_is_the_average_by_its_profile(walk, folder, relative_std, step):
    found = snapshots.reconstruct(folder, step, relative_std, LIKE)
    last = step // EVERY * EVERY
    assert (found.step, found.snapshots) == (last, 2 * last // EVERY)
    assert found.params["layer"]["kernel"].dtype == np.float32
    assert found.params["log_snr"]["end"].shape == ()
    direct = by_profile(walk, relative_std, last)
    kept = [by_profile(walk, std, last) for std in KEPT]
    spread = np.ptp([by_profile(walk, std, last) for std in (0.03, 0.05, 0.1, 0.2)], axis=0).max()
    error = np.abs(flat(found.params) - direct).max()
    assert error < 0.07 * spread
    if relative_std not in KEPT:  # nearer than what there was
        assert error < 0.3 * min(np.abs(k - direct).max() for k in kept)


def test_a_width_that_was_kept_is_its_file(folder):
    for std in KEPT:
        with np.load(folder / f"step_00000400_std{std}.npz") as file:
            kept = dict(file)
        assert set(kept) == {"layer/kernel", "layer/bias", "log_snr/end"}
        found = snapshots.reconstruct(folder, STEPS, std, LIKE).params
        close(found["layer"]["kernel"], kept["layer/kernel"], rtol=1e-5, atol=1e-5)
        close(found["log_snr"]["end"], kept["log_snr/end"], rtol=1e-5)


def test_the_misfit_is_the_distance_of_the_profiles():
    kept = [ema.Profile(t, ema.power_of(s)) for t in (40, 70, 100) for s in KEPT]
    for std in (0.02, 0.07, 0.25):
        wanted = ema.Profile(100, ema.power_of(std))
        factors = ema.reconstruction(kept, wanted)

        def density(p, x):
            return (p.gamma + 1) * x**p.gamma / p.time ** (p.gamma + 1) * (x <= p.time)

        def difference(x, factors=factors, wanted=wanted):
            parts = (f * density(p, x) for f, p in zip(factors, kept, strict=True))
            return (sum(parts) - density(wanted, x)) ** 2

        pieces = ((0, 40), (40, 70), (70, 100))
        square = sum(integrate.quad(difference, *piece)[0] for piece in pieces)
        whole = integrate.quad(lambda x: density(wanted, x) ** 2, 0, 100)[0]  # noqa: B023
        close(ema.misfit(kept, wanted, factors), np.sqrt(square / whole), rtol=1e-4)
        # By least squares: no other factors come nearer.
        for i in range(len(kept)):
            other = factors + 0.01 * (np.arange(len(kept)) == i)
            assert ema.misfit(kept, wanted, other) > ema.misfit(kept, wanted, factors)
    itself = ema.reconstruction(kept, kept[-1])
    assert ema.misfit(kept, kept[-1], itself) < 1e-6
    close(ema.misfit(kept, kept[-1], 0 * itself), 1)


@pytest.mark.parametrize("relative_std", [0.001, 0.015, 0.28])
def test_a_width_that_they_do_not_make_is_refused(folder, relative_std):
    """The nearest sum is none of its average: 0.28 would come out 5 percent too small."""
    with pytest.raises(InputError) as error:
        snapshots.reconstruct(folder, STEPS, relative_std, LIKE)
    said = (
        rf"ema_relative_std = {relative_std}: the snapshots in .*, 40 up to step 400, make it no "
    )
    assert re.search(said + r"better than to \d+%: take a width nearer to 0.05, 0.1, or train with "
                     "more", str(error.value))  # fmt: skip
    assert "\n" not in str(error.value)


def save_all(folder, **changes):
    for step in (10, 20, 30):
        for std in KEPT:
            snapshots.save(folder, step, [tree(np.full(10, np.float32(step)))], [std])
    return folder / "step_00000020_std0.1.npz"


def cut_short(path):
    path.write_bytes(path.read_bytes()[:300])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(20).tobytes() * 3)] ^= 1
    path.write_bytes(bytes(data))


def claim_to_be_encrypted(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(data))


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        flip_a_bit,
        claim_to_be_encrypted,
        one_array,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not an archive"),
    ],
    ids=["cut", "bit", "encrypted", "npy", "empty", "text"],
)
def test_a_damaged_one_is_named_and_the_others_do_without(tmp_path, damage):
    path = save_all(tmp_path)
    before = snapshots.reconstruct(tmp_path, 30, 0.07, LIKE)
    damage(path)
    with pytest.raises(
        InputError, match=r"step_00000020_std0.1.npz: cannot be read .*remove it$"
    ) as e:
        snapshots.reconstruct(tmp_path, 30, 0.07, LIKE)
    assert "\n" not in str(e.value)
    snapshots.reconstruct(tmp_path, 10, 0.05, LIKE)  # it is not among these
    path.unlink()
    after = snapshots.reconstruct(tmp_path, 30, 0.07, LIKE)
    assert (before.snapshots, after.snapshots, after.step) == (6, 5, 30)


@pytest.mark.parametrize(
    "other",
    [
        {"layer": {"kernel": np.zeros((1, 3)), "bias": np.zeros(3)}, "log_snr": LIKE["log_snr"]},
        {"layer": LIKE["layer"]},
        LIKE | {"more": np.zeros(2)},
    ],
    ids=["shape", "missing", "more"],
)
def test_one_of_another_network_is_named(tmp_path, other):
    """Also where it would broadcast."""
    save_all(tmp_path)
    snapshots.save(tmp_path, 20, [other], [0.1])
    with pytest.raises(InputError, match=r"std0.1.npz: of another network than the checkpoint"):
        snapshots.reconstruct(tmp_path, 30, 0.07, LIKE)


def test_none_up_to_the_step(tmp_path):
    said = r"no averages in .* up to step 9: train with .*ema_snapshot_every, or leave"
    for _ in range(2):
        with pytest.raises(InputError, match=said):
            snapshots.reconstruct(tmp_path / "averages", 9, 0.07, LIKE)
        save_all(tmp_path / "averages")


def test_widths_alike_to_six_digits_are_two_files(tmp_path):
    snapshots.save(
        tmp_path, 10, [tree(np.zeros(10)), tree(np.ones(10))], (0.05, np.float64(0.05000001))
    )
    assert {float(p.stem.split("std")[1]) for p in tmp_path.iterdir()} == {0.05, 0.05000001}


def test_those_of_later_steps_are_cut_and_nothing_else(tmp_path):
    save_all(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".step_00000030_std0.1.npz.partial").write_text("half")
    snapshots.cut(tmp_path, 20)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {
        "step_00000010_std0.05.npz", "step_00000010_std0.1.npz", "step_00000020_std0.05.npz",
        "step_00000020_std0.1.npz", "notes.txt", ".step_00000030_std0.1.npz.partial",
    }  # fmt: skip
    assert snapshots.reconstruct(tmp_path, 30, 0.07, LIKE).step == 20
    snapshots.cut(tmp_path / "none", 0)

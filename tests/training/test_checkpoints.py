"""Checkpoints come back bit for bit, or not at all: damage is found, named and stepped over."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import cli
from ddpm.diffusion.timesteps import LossHistory
from ddpm.errors import InputError
from ddpm.training import sharding
from ddpm.training.checkpoints import Checkpoints, NotWritten, digest, items_of, saved_meta
from ddpm.training.optimizer import adam
from ddpm.training.state import TrainState


def state_at(step, size=300):
    params = {"a": {"kernel": jax.random.normal(jax.random.key(step), (size, 3))}, "b": jnp.ones(4)}
    ema = jax.tree.map(lambda x: x / 2, params)
    return TrainState(jnp.int32(step), params, ema, adam(1e-3, warmup_steps=10).init(params))


def abstract(state):
    return sharding.abstract_like(items_of(state), sharding.replicated(sharding.data_mesh()))


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    about = {"config": {"seed": 1}, "image_shape": [8, 8, 1], "num_images": 9}
    for step in (10, 20, 30):
        checkpoints.save(state_at(step), about)
    checkpoints.close()
    return folder


def restore(folder, state, **options):
    said = []
    checkpoints = Checkpoints(folder, keep=3, **options)
    try:
        return checkpoints.restore(abstract(state), said.append), said
    finally:
        checkpoints.close()


def assert_equal(found, state):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(items_of(state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_newest_comes_back_bit_for_bit(saved):
    (found, meta), said = restore(saved, state_at(0))
    assert_equal(found, state_at(30))
    assert jax.tree.structure(found) == jax.tree.structure(items_of(state_at(0)))
    assert (meta["step"], meta["config"], said) == (30, {"seed": 1}, [])
    assert saved_meta(saved)["config"] == {"seed": 1}


def test_folders_whose_names_are_no_steps_are_passed_over(saved):
    for name in ("5²", "५", "40_old", "note"):
        (saved / name).mkdir()
    (found, meta), said = restore(saved, state_at(0))
    assert (meta["step"], said) == (30, [])
    assert_equal(found, state_at(30))
    assert saved_meta(saved)["config"] == {"seed": 1}


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in range(1, 6):
        checkpoints.save(state_at(step), {})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["4", "5"]


def test_none_saved_yet(tmp_path):
    assert restore(tmp_path / "new", state_at(0)) == (None, [])
    assert saved_meta(tmp_path / "nowhere") is None


def data_files(step_folder):
    """All of them: Orbax leaves some there that it has merged into others and reads no more."""
    return list((step_folder / "params").rglob("d/*"))


def truncate(step_folder):
    for file in data_files(step_folder):
        file.write_bytes(file.read_bytes()[:100])


def flip_bytes(step_folder):
    for file in data_files(step_folder):
        data = bytearray(file.read_bytes())
        for i in range(len(data) // 2, min(len(data), len(data) // 2 + 64)):
            data[i] ^= 0xFF
        file.write_bytes(data)


def empty(step_folder):
    for file in sorted(step_folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()


def lose_meta(step_folder):
    (step_folder / "meta" / "metadata").unlink()


def lose_an_item(step_folder):
    empty(step_folder / "opt_state")


@pytest.mark.parametrize("damage", [truncate, flip_bytes, empty, lose_meta, lose_an_item])
def test_damaged_checkpoint_is_moved_aside_and_the_one_before_taken(saved, damage):
    damage(saved / "30")
    (found, meta), said = restore(saved, state_at(0))
    assert meta["step"] == 20
    assert_equal(found, state_at(20))
    assert len(said) == 2
    assert "checkpoint 30" in said[0]
    assert "damaged_checkpoints" in said[1]
    assert "\n" not in "".join(said)
    assert not (saved / "30").exists()
    assert (saved.parent / "damaged_checkpoints" / "30").exists()

    again = Checkpoints(saved, keep=3)  # the same step can be written anew
    again.save(state_at(30), {})
    again.close()
    assert restore(saved, state_at(0))[0][1]["step"] == 30


def test_read_only_moves_nothing(saved):
    truncate(saved / "30")
    (_, meta), said = restore(saved, state_at(0), read_only=True)
    assert meta["step"] == 20
    assert len(said) == 1
    assert (saved / "30").exists()


def test_all_damaged_is_an_error_that_names_them(saved):
    for step in (10, 20, 30):
        truncate(saved / str(step))
    for _ in range(2):  # nothing is moved, so a second start does not begin at 0
        with pytest.raises(InputError, match=r"no checkpoint .* is good: 30 .*20 .*10"):
            restore(saved, state_at(0))
    assert sorted(p.name for p in saved.iterdir() if p.name.isdigit()) == ["10", "20", "30"]


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), RuntimeError, "RESOURCE_EXHAUSTED"),
        (MemoryError(), MemoryError, ""),
        (PermissionError(13, "Permission denied", "params/x"), InputError, "params/x: Permission"),
    ],
)
def test_what_is_no_damage_is_not_taken_for_it(saved, monkeypatch, error, raised, said):
    def fails(*args, **options):
        raise ValueError("reading failed") from error

    checkpoints = Checkpoints(saved, keep=3)
    monkeypatch.setattr(checkpoints._manager, "restore", fails)
    with pytest.raises((raised, ValueError)) as found:
        checkpoints.restore(abstract(state_at(0)), print)
    checkpoints.close()
    whole = [str(found.value), str(found.value.__cause__)]
    assert isinstance(found.value, InputError) == (raised is InputError)
    assert any(said in text for text in whole)
    assert (saved / "30").exists()


def test_another_architecture_is_refused_by_name(saved):
    with pytest.raises(InputError, match=r"a/kernel is \(300, 3\) there and \(200, 3\)"):
        restore(saved, state_at(0, size=200))
    assert (saved / "30").exists()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bfloat16])
def test_digest_changes_with_any_bit(dtype):
    x = jnp.arange(1000).astype(dtype)
    before = digest({"x": x, "y": x})
    for index in (0, 1, 999):
        other = digest({"x": x.at[index].add(1 if index < 999 else 16), "y": x})
        assert other[0] != before[0]
        assert other[1] == before[1]
    assert digest({"x": x[::-1]}) != digest({"x": x})


def test_history_of_losses_comes_back_where_there_is_one(saved):
    history = LossHistory(jax.random.normal(jax.random.key(0), (20, 10)), jnp.arange(20))
    state = state_at(40)._replace(loss_history=history)
    checkpoints = Checkpoints(saved, keep=3)
    checkpoints.save(state, {})
    checkpoints.wait()
    placed = sharding.replicated(sharding.data_mesh())
    found, meta = checkpoints.restore(sharding.abstract_like(items_of(state), placed), print)
    checkpoints.close()
    assert meta["step"] == 40
    for a, b in zip(found["loss_history"], history, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "loss_history" not in items_of(state_at(40))
    # Who has no use for it does not need it, as sampling does not.
    (found, _), said = restore(saved, state_at(40))
    assert_equal(found, state_at(40))
    assert said == []


@contextlib.contextmanager
def full_disk(size):
    """Files can hold no more bytes than that, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(saved, capfd):
    state, about = state_at(40, size=100_000), {"config": {}, "image_shape": [8], "num_images": 9}
    with cli._progress_on_stderr(), full_disk(100_000):
        cli._set_up("")
        checkpoints = Checkpoints(saved)
        checkpoints.save(state, about)
        with pytest.raises(NotWritten, match=r"File too large; .* resumes from step 30") as error:
            checkpoints.wait()
        checkpoints.close()  # what has failed fails but once
    assert "\n" not in str(error.value)
    assert isinstance(error.value, InputError)
    assert not capfd.readouterr().err
    (found, _), said = restore(saved, state_at(0))
    assert_equal(found, state_at(30))
    assert not said
    again = Checkpoints(saved)  # there is room again
    again.save(state, about)
    again.close()
    assert saved_meta(saved)["step"] == 40


def test_another_error_while_writing_is_not_the_disks(saved):
    checkpoints = Checkpoints(saved)
    with pytest.raises(TypeError):  # of JSON
        checkpoints.save(state_at(40), {"config": object()}) or checkpoints.wait()
    checkpoints.close()

"""A training that the memory cannot hold is refused or warned of before it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm.files import machine
from ddpm.modes import evaluate, sample, start, train
from ddpm.training import memory
from tests.runs import command, run
from tests.test_main import fails

SIDE = 100
ARRAY = 4 * SIDE**2  # bytes


def alive(function):
    """The most arrays alive at once in a function of float32[SIDE, SIDE], by the estimate."""
    traced = jax.jit(function).trace(jax.ShapeDtypeStruct((SIDE, SIDE), np.float32))
    return memory.temporaries(traced.jaxpr.jaxpr) / memory._XLA / ARRAY


def products(x):
    y = x @ x
    z = y @ x
    return ((z @ y) @ x).sum()  # y, z and their product at once; y and z are not needed later


def fused(x):
    y = jnp.sin(x @ x)  # next to the product
    return jnp.exp(2 * jnp.cos(y) + 1).sum() + (y[None] * jnp.ones((7, 1, 1))).sum()


def called(x):
    return jax.jit(products)(x) + jax.jit(products)(x)


def looped(x):
    y = x @ x
    return jax.lax.scan(lambda s, _: (s + products(x), None), y.sum(), length=5)[0] + y.sum()


@pytest.mark.parametrize(
    ("function", "arrays"), [(products, 3), (fused, 2), (called, 3), (looped, 4)]
)
def test_what_is_alive_at_once_and_not_fused_is_counted(function, arrays):
    assert alive(function) == pytest.approx(arrays, abs=0.01)


def test_gradients_keep_what_they_need():
    """Of a chain of n products all factors; its value needs only the last two."""

    def chain(x):
        y = x
        for _ in range(8):
            y = y @ jnp.full((SIDE, SIDE), 0.5)
            y = y * y
        return y.sum()

    assert alive(chain) < 4 < 8 <= alive(jax.grad(chain))


def of(total, free):
    return lambda device: memory.Memory(total, free)


KEYS = "batch_size = 4096, config.data.image_size = (8, 8) and config.model.channels = 8"


def test_what_cannot_fit_is_refused_before_it_is_compiled(tmp_path, monkeypatch):
    large = command(tmp_path / "run", training__batch_size=4096)
    monkeypatch.setattr(memory, "memory", of(10**4, 10**4))  # less than the weights
    fails(large, KEYS, "of 1e-05 GB here", "not even the smallest batch would fit")
    monkeypatch.setattr(memory, "memory", of(10**7, 10**7))
    fails(large, KEYS, "a batch of 256 would fit; or lower image_size or channels")
    assert not (tmp_path / "run").exists()


def test_what_may_not_fit_is_warned_of_and_traced_only_once(tmp_path, monkeypatch):
    made, traced = start.make_train_step, []

    def counted(*args, **options):
        step = made(*args, **options)
        return lambda *given: (traced.append(1), step(*given))[1]

    monkeypatch.setattr(start, "make_train_step", counted)
    monkeypatch.setattr(memory, "memory", of(10**9, 10**5))
    done = run(command(tmp_path / "run", training__steps=2))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: config.training.batch_size = 8, ") == 1
    assert len(traced) == 1
    monkeypatch.setattr(memory, "memory", of(10**9, 10**9))
    done = run(command(tmp_path / "run", training__steps=2))
    assert "warning" not in done.stderr


def test_memory_is_that_of_the_machine_or_of_the_control_group(monkeypatch):
    (device, *_), devices = jax.local_devices(), jax.local_device_count()
    found = memory.memory(device)
    assert 0 < found.free <= found.total
    groups = [memory.Memory(10**6, 10**6), memory.Memory(10**7, 10**7)]
    monkeypatch.setattr(machine, "_of_groups", lambda: iter(groups))
    assert memory.memory(device) == (10**6 // devices, 10**6 // devices)


@pytest.mark.parametrize(
    ("mode", "module", "said"),
    [
        ("train", train, "lower config.training.batch_size = 8, or"),
        ("sample", sample, "lower config.sampling.batch_size = 4, or"),
        ("evaluate", evaluate, "sampling.batch_size = 4 or config.evaluation.batch_size = 250, or"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 25323016384"),
    ],
)
def test_out_of_memory_is_a_line_in_all_modes(tmp_path, monkeypatch, mode, module, said, error):
    def none(*args, **options):
        try:
            raise error
        except Exception as below:  # as other layers do
            raise RuntimeError("cannot go on") from below

    monkeypatch.setattr(module, "check_run" if module is train else "load_run", none)
    fails(
        command(tmp_path / "run", f"--mode={mode}"),
        "out of memory (",
        said,
        "config.data.image_size",
        "config.model.channels",
    )

"""Any number of 8-bit samples from one compiled sampler, in batches, each seeded by its number."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ddpm.diffusion.pixels import to_uint8
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import sample_keys
from ddpm.errors import InputError
from ddpm.sampling import samplers
from ddpm.sampling.editing import share
from ddpm.sampling.sample import sample_chain
from ddpm.sampling.samplers import Sampler


class Generator:
    """Samples of one model. Compiled once: the last, partial batch is drawn whole and cut.

    `make_denoiser` closes over the weights and, where samples are of different classes, say, over
    which they are: (params, numbers of the samples int[B]) -> Denoiser. With `given`, images that
    samples are made from, it takes those too: of sample i given[i mod n], [B, ...]. `times` are the
    sampler's own if left out. `sharding` splits a batch over devices, whose number must divide
    `batch_size`.
    `evaluations` is how often the last batch called the denoiser; `compiled`, whether `compile` was
    called.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        make_denoiser: Callable[..., Denoiser],
        sampler: Sampler,
        image_shape: tuple[int, int, int],
        *,
        batch_size: int,
        times: np.ndarray | None = None,
        sharding: NamedSharding | None = None,
        given: np.ndarray | None = None,
    ) -> None:
        if times is None:
            times = samplers.times(schedule.num_steps, sampler.steps)
        self.batch_size = batch_size
        self._given_images = given
        self.times = tuple(times.tolist())
        self.evaluations = 0
        shape = (batch_size, *image_shape)
        options: dict[str, Any] = {"sampler": sampler, "times": times}

        def draw(
            params: Any, seed: jax.Array, start: jax.Array, *images: jax.Array
        ) -> tuple[jax.Array, ...]:
            indices = start + jnp.arange(batch_size, dtype=jnp.int32)
            if sharding is not None:
                indices, *images = jax.lax.with_sharding_constraint((indices, *images), sharding)
            typed = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
            keys = sample_keys(seed if typed else jax.random.key(seed), indices)
            denoiser = make_denoiser(params, indices, *images)
            chain = sample_chain(keys, schedule, denoiser, shape, snapshots=0, **options)
            return chain.x_0, jnp.isfinite(chain.x_0).all(), chain.evaluations

        def draw_chain(
            snapshots: int, params: Any, keys: jax.Array, *images: jax.Array
        ) -> jax.Array:
            few = (len(keys), *image_shape)
            denoiser = make_denoiser(params, jnp.arange(len(keys), dtype=jnp.int32), *images)
            chain = sample_chain(keys, schedule, denoiser, few, snapshots=snapshots, **options)
            return to_uint8(jnp.concatenate([chain.x_t, chain.x_0[None]]))

        def draw_predicted(
            snapshots: int, params: Any, keys: jax.Array, *images: jax.Array
        ) -> jax.Array:
            few = (len(keys), *image_shape)
            denoiser = make_denoiser(params, jnp.arange(len(keys), dtype=jnp.int32), *images)
            chain = sample_chain(keys, schedule, denoiser, few, snapshots=snapshots, **options)
            return to_uint8(chain.predicted_x_0)

        def draw_sharing(t: float, params: Any, keys: jax.Array, *images: jax.Array) -> jax.Array:
            few = (len(keys), *image_shape)
            denoiser = make_denoiser(params, jnp.zeros(1, jnp.int32), *images)
            return to_uint8(share(keys, schedule, denoiser, few, t, **options))

        self._draw_predicted = jax.jit(draw_predicted, static_argnums=0)
        self._draw_sharing = jax.jit(draw_sharing, static_argnums=0)
        self._draw: Any = jax.jit(draw)
        self._to_uint8 = jax.jit(to_uint8)
        self.compiled = False
        self._draw_chain = jax.jit(draw_chain, static_argnums=0)

    def compile(self, params: Any) -> None:
        """Compiles the program that draws a batch by weights like these, which the first batch
        would do else."""
        arguments = params, np.uint32(0), np.int32(0), *self._given(0, self.batch_size)
        self._draw, self.compiled = self._draw.lower(*arguments).compile(), True

    def batches(self, params: Any, num_samples: int, *, seed: int) -> Iterator[np.ndarray]:
        """Yields uint8[n, H, W, C], n <= batch_size, until there are num_samples.

        Raises InputError for samples that are not finite, which uint8 would hide.
        """
        for left, x_0 in self._drawn(params, num_samples, seed):
            yield _whole(self._to_uint8(x_0))[:left]

    def floats(self, params: Any, num_samples: int, key: jax.Array) -> np.ndarray:
        """Returns what `samples` rounds to 8 bits, x_0 in about [-1, 1], float32[num_samples, H, W,
        C], by a key: jax.random.key(seed) for those of a seed."""
        drawn = self._drawn(params, num_samples, key)
        return np.concatenate([_whole(x_0)[:left] for left, x_0 in drawn])

    def _drawn(
        self, params: Any, num_samples: int, seed: int | jax.Array
    ) -> Iterator[tuple[int, jax.Array]]:
        """Yields how many samples are left to draw, and the next batch of them, whole."""
        root = seed if isinstance(seed, jax.Array) else np.uint32(seed)
        for start in range(0, num_samples, self.batch_size):
            x_0, finite, calls = self._draw(
                params, root, np.int32(start), *self._given(start, self.batch_size)
            )
            self.evaluations = int(calls)
            if not finite:
                raise InputError(
                    f"samples {start}..{start + self.batch_size - 1} are not finite: the model "
                    "diverged; try config.sampling.clip = True, or an earlier checkpoint"
                )
            yield num_samples - start, x_0

    def samples(self, params: Any, num_samples: int, *, seed: int) -> np.ndarray:
        """Returns all samples at once, uint8[num_samples, H, W, C]."""
        return np.concatenate(list(self.batches(params, num_samples, seed=seed)))

    def chain(self, params: Any, num_samples: int, *, seed: int, snapshots: int) -> np.ndarray:
        """Returns x_t on the way to x_0, the last frame: uint8[frames, num_samples, H, W, C]."""
        keys = sample_keys(jax.random.key(seed), np.arange(num_samples))
        given = self._given(0, num_samples)
        return np.asarray(self._draw_chain(snapshots, params, keys, *given))

    def progressive(self, params: Any, num_samples: int, *, seed: int, snapshots: int) -> Any:
        """Returns x_0 as predicted along the chains (Figure 6): uint8[snapshots, num_samples, H, W,
        C]."""
        keys = sample_keys(jax.random.key(seed), np.arange(num_samples))
        given = self._given(0, num_samples)
        return np.asarray(self._draw_predicted(snapshots, params, keys, *given))

    def sharing(self, params: Any, num_samples: int, *, seed: int, t: float) -> np.ndarray:
        """Samples whose chains are one until x_t (Figure 7): uint8[num_samples, H, W, C].

        All are of what sample 0 is of.

        t must be one of `times`, above 0.
        """
        keys = sample_keys(jax.random.key(seed), np.arange(num_samples))
        return np.asarray(self._draw_sharing(t, params, keys, *self._given(0, 1)))

    def _given(self, start: int, n: int) -> tuple[np.ndarray, ...]:
        """Returns the images that samples start .. start + n - 1 are made from, if any."""
        images = self._given_images
        return () if images is None else (images[np.arange(start, start + n) % len(images)],)


def _whole(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

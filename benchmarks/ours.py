"""The timed parts of this library: the step that training runs, and its sampler."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from networks import EMA_DECAY, GRAD_CLIP, LEARNING_RATE, STEPS, Network

import ddpm
from ddpm.diffusion.process import StepInfo
from ddpm.sampling.generate import Generator
from ddpm.training.checkpoints import parameter_count
from ddpm.training.objectives import simple
from ddpm.training.optimizer import adam
from ddpm.training.state import Metrics, TrainState, init
from ddpm.training.step import make_train_step


class Bench:
    """One network, its step, forward pass and sampler; compiled at their first call."""

    def __init__(self, network: Network, *, dtype: str) -> None:
        self.network = network
        self.dtype = jnp.dtype(dtype)
        self.model = ddpm.UNet(**network.unet, dtype=self.dtype)
        self.schedule = ddpm.schedules.linear(1000)
        optimizer = adam(LEARNING_RATE, grad_clip=GRAD_CLIP)
        start = jax.jit(lambda: init(self.model, optimizer, network.image_shape, 0))
        self.state: TrainState = start()
        self.metrics = jax.jit(Metrics.zero)()
        step = make_train_step(
            self.model, simple(self.schedule), optimizer, ema_decay=EMA_DECAY, seed=0
        )
        self._train = jax.jit(step, donate_argnums=(0, 1))
        shape = (network.batch_size, *network.image_shape)
        self.images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self._forward = jax.jit(lambda p, x, t: self.model.apply({"params": p}, x, t))

        def clipped(params: Any) -> ddpm.Denoiser:
            network = lambda x, t: jnp.asarray(self.model.apply({"params": params}, x, t))  # noqa: E731
            return ddpm.clipped(self.schedule, ddpm.denoiser(self.schedule, network))

        sampler = ddpm.ancestral()

        def one_step(params: Any, key: jax.Array) -> jax.Array:
            x, noise = jax.random.normal(key, (2, *shape))
            t = jnp.asarray(500)
            step = StepInfo(t, t - 1, jnp.asarray(0), jnp.stack([t, t - 1]))
            return sampler.step(self.schedule, clipped(params), x, step, lambda k=0: noise, ()).x

        self._step = jax.jit(one_step)
        self._generator = Generator(
            self.schedule,
            clipped,
            ddpm.ddim(steps=STEPS),
            network.image_shape,
            batch_size=network.batch_size,
        )

    def train(self) -> None:
        """Runs one step of training."""
        self.state, self.metrics = self._train(self.state, self.metrics, self.images)
        jax.block_until_ready(self.state)

    def forward(self) -> None:
        """Runs the network alone."""
        x = self.images.astype(np.float32)
        self._forward(self.state.params, x, np.arange(1, len(x) + 1)).block_until_ready()

    def step(self) -> None:
        """Runs one ancestral step, clipped."""
        self._step(self.state.params, jax.random.key(0)).block_until_ready()

    def sample(self) -> None:
        """Draws a whole batch by DDIM in STEPS steps."""
        self._generator.samples(self.state.params, self.network.batch_size, seed=0)

    def weights(self) -> dict[str, np.ndarray]:
        """Returns {path: array}, not at their small initial values, so that outputs can be
        compared."""
        flat, _ = jax.tree_util.tree_flatten_with_path(self.state.params)
        rng = np.random.default_rng(1)
        return {
            "/".join(p.key for p in path): np.asarray(leaf)
            + rng.normal(0, 0.02, leaf.shape).astype(np.float32)
            for path, leaf in flat
        }

    def output(self, x: np.ndarray, t: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the network's output for x [B, H, W, C] and the authors' t = 0..T-1."""
        params: dict[str, Any] = {}
        for path, array in weights.items():
            *parents, leaf = path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array
        return np.asarray(self._forward(params, x, t + 1))

    def peak_memory(self) -> int | None:
        """Bytes on an accelerator; None on a CPU."""
        stats = jax.devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else None

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return parameter_count(self.state.params)

    def product(self, n: int) -> Callable[[], object]:
        """Returns a product of two n x n matrices, to be called."""
        a = jax.random.normal(jax.random.key(0), (n, n), self.dtype)
        multiply = jax.jit(jnp.matmul)
        return lambda: multiply(a, a).block_until_ready()

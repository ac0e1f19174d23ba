"""The timed parts of this library: the step that training runs, and its sampler."""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from networks import EMA_DECAY, GRAD_CLIP, LEARNING_RATE, WHAT, Network

import ddpm
from ddpm.diffusion.process import StepInfo
from ddpm.sampling.generate import Generator
from ddpm.training.checkpoints import parameter_count
from ddpm.training.objectives import simple
from ddpm.training.optimizer import adam
from ddpm.training.state import Metrics, TrainState, init
from ddpm.training.step import make_train_step

KINDS = {"unet": ddpm.UNet, "dit": ddpm.DiT}
# XLA's names of what PyTorch calls with and without TF32; without either, JAX's own default.
PRECISIONS = {"float32": "float32", "tf32": "tensorfloat32"}


def devices() -> dict[str, str]:
    """Returns what JAX computes on: of the first device, and how many there are."""
    first = jax.devices()[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "number": str(jax.device_count()),
        "runtime": " ".join(str(first.client.platform_version).split()),
        "memory": f"{limit / 2**30:.1f} GiB" if limit else "as the system has",
    }


def model(network: Network, dtype: str, **more: Any) -> nn.Module:
    """Returns a network that computes in `dtype`."""
    return KINDS[network.kind](**network.settings, dtype=jnp.dtype(dtype), **more)


class Bench:
    """One network, its step, forward pass and sampler; compiled by `compile`, or at their first
    call.

    Calls of `train`, `forward` and `step` return once they are on their way; `settle` waits.
    """

    def __init__(
        self, network: Network, *, dtype: str, precision: str = "", remat: str = "none"
    ) -> None:
        if precision:
            jax.config.update("jax_default_matmul_precision", PRECISIONS[precision])
        self.network = network
        self.dtype = jnp.dtype(dtype)
        self.model = model(network, dtype, remat=remat)
        self.schedule = ddpm.schedules.linear(1000)
        optimizer = adam(LEARNING_RATE, grad_clip=GRAD_CLIP)
        start = jax.jit(lambda: init(self.model, optimizer, network.image_shape, 0))
        self.state: TrainState = start()
        self.metrics = jax.jit(Metrics.zero)()
        step = make_train_step(
            self.model, simple(self.schedule), optimizer, ema_decay=EMA_DECAY, seed=0
        )
        self._train: Any = jax.jit(step, donate_argnums=(0, 1))
        shape = (network.batch_size, *network.image_shape)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.images = jax.device_put(images)
        self._times = jnp.arange(1, len(images) + 1)
        self._forward: Any = jax.jit(
            lambda p, x, t: self.model.apply({"params": p}, x.astype(jnp.float32), t)
        )

        def clipped(params: Any) -> ddpm.Denoiser:
            network = lambda x, t: jnp.asarray(self.model.apply({"params": params}, x, t))  # noqa: E731
            return ddpm.clipped(self.schedule, ddpm.denoiser(self.schedule, network))

        sampler = ddpm.ancestral()

        def one_step(params: Any, key: jax.Array) -> jax.Array:
            x, noise = jax.random.normal(key, (2, *shape))
            t = jnp.asarray(500)
            step = StepInfo(t, t - 1, jnp.asarray(0), jnp.stack([t, t - 1]))
            return sampler.step(self.schedule, clipped(params), x, step, lambda k=0: noise, ()).x

        self._step: Any = jax.jit(one_step)
        self._key = jax.random.key(0)
        self._generator = Generator(
            self.schedule,
            lambda params, _: clipped(params),
            ddpm.ddim(steps=network.ddim_steps),
            network.image_shape,
            batch_size=network.batch_size,
        )
        self._last: Any = None
        self.analysis: dict[str, dict[str, float]] = {}

    def settle(self) -> None:
        """Waits until what was begun is done."""
        jax.block_until_ready(self._last)

    def train(self) -> None:
        """Begins one step of training."""
        self.state, self.metrics = self._train(self.state, self.metrics, self.images)
        self._last = self.state

    def forward(self) -> None:
        """Begins the network alone."""
        self._last = self._forward(self.state.params, self.images, self._times)

    def step(self) -> None:
        """Begins one ancestral step, clipped."""
        self._last = self._step(self.state.params, self._key)

    def sample(self) -> None:
        """Draws a whole batch by DDIM in `ddim_steps` steps."""
        self._generator.samples(self.state.params, self.network.batch_size, seed=0)

    def compile(self, *, what: Sequence[str] = WHAT) -> dict[str, float]:
        """Compiles programs; returns the seconds of each. The training step is compiled first,
        alone, the others at the same time as each other."""
        params, seconds = self.state.params, {}
        arguments = {
            "train": (self.state, self.metrics, self.images),
            "forward": (params, self.images, self._times),
            "step": (params, self._key),
        }

        def ahead(name: str) -> None:
            start = time.perf_counter()
            if name == "sample":
                self._generator.compile(params)
            else:
                lowered = getattr(self, f"_{name}").lower(*arguments[name])
                compiled = lowered.compile()
                self.analysis[name] = _analysis(lowered, compiled)
                setattr(self, f"_{name}", compiled)
            seconds[name] = time.perf_counter() - start

        if "train" in what:
            ahead("train")
        with ThreadPoolExecutor() as pool:
            list(pool.map(ahead, [name for name in what if name != "train"]))
        return seconds

    def profile(self, *, folder: str, calls: int) -> None:
        """Writes a profile of so many steps of training, for TensorBoard, XProf or Perfetto."""
        self.train()
        self.settle()
        with jax.profiler.trace(folder):
            for _ in range(calls):
                self.train()
            self.settle()

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

    def _with(self, weights: dict[str, np.ndarray]) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for path, array in weights.items():
            *parents, leaf = path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array
        return params

    def output(self, x: np.ndarray, t: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the network's output for x [B, H, W, C] and the authors' t = 0..T-1."""
        return np.asarray(self._forward(self._with(weights), x, t + 1))

    def gradient_errors(self, *, batches: int) -> dict[str, list[float]]:
        """Returns how far a step's gradient in bfloat16, and in TF32, is from that in float32, by
        batch: the norm of the difference over the norm."""
        params = jax.device_put(self._with(self.weights()))
        keep = optax.trace(0.0)  # whose state is the gradient

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def gradient(dtype: str, precision: str, params: Any, images: jax.Array) -> Any:
            with jax.default_matmul_precision(PRECISIONS[precision]):
                step = make_train_step(
                    model(self.network, dtype), simple(self.schedule), keep, ema_decay=0.0, seed=0
                )
                state = TrainState(jnp.zeros((), jnp.int32), params, params, keep.init(params))
                return step(state, Metrics.zero(), images)[0].opt_state.trace

        @jax.jit
        def error(a: Any, b: Any) -> jax.Array:
            return optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b)

        found: dict[str, list[float]] = {"bfloat16": [], "tf32": []}
        for i in range(batches):
            images = jnp.roll(self.images, i, axis=2)
            exact = gradient("float32", "float32", params, images)
            for name, how in (("bfloat16", ("bfloat16", "tf32")), ("tf32", ("float32", "tf32"))):
                found[name].append(float(error(gradient(*how, params, images), exact)))
        return found

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

        def begin() -> None:
            self._last = multiply(a, a)

        return begin


def _analysis(lowered: Any, compiled: Any) -> dict[str, float]:
    """Returns XLA's counts of a program: FLOPs, before it chooses kernels, and bytes."""
    cost, memory = lowered.cost_analysis() or {}, compiled.memory_analysis()
    found = {"flops": float(cost.get("flops", 0))}
    if memory is not None:
        found |= {
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        }
    return found

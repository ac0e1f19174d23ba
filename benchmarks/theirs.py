"""The timed parts of PyTorch: the same network from diffusers, and denoising-diffusion-pytorch's
own.

The same work in each: noise at random times, squared error, gradient, clipping, Adam, EMA.
"""

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from networks import EMA_DECAY, GRAD_CLIP, LEARNING_RATE, WHAT, Network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# As lucidrains' README has it, where the network's own numbers are not given.
_T = 1000


def devices() -> dict[str, str]:
    """Returns what PyTorch computes on, and its versions."""
    found = {"platform": DEVICE, "torch": torch.__version__}
    if DEVICE == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return found


def unet2d(network: Network) -> torch.nn.Module:
    """Returns diffusers' UNet2DModel, set up as the authors' network; ValueError for another."""
    if network.kind != "unet":
        raise ValueError(f"diffusers' UNet2DModel is no {network.kind}")
    from diffusers import UNet2DModel

    defaults = {
        "channels": 128,
        "channel_multipliers": (1, 2, 2, 2),
        "num_res_blocks": 2,
        "attention_resolutions": (16,),
        "dropout": 0.1,
        "num_groups": 32,
    }
    u = defaults | network.settings
    height, width, channels = network.image_shape
    levels = range(len(u["channel_multipliers"]))
    attends = [min(height, width) >> i in u["attention_resolutions"] for i in levels]
    return UNet2DModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=[u["channels"] * m for m in u["channel_multipliers"]],
        layers_per_block=u["num_res_blocks"],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=None,
        norm_num_groups=u["num_groups"],
        norm_eps=1e-6,
        dropout=u["dropout"],
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def lucidrains(network: Network, parameters: int) -> torch.nn.Module:
    """Returns denoising-diffusion-pytorch's Unet, of the width nearest to `parameters`."""
    from denoising_diffusion_pytorch import Unet

    multipliers = network.settings.get("channel_multipliers", (1, 2, 2, 2))

    def build(dim: int) -> torch.nn.Module:
        return Unet(
            dim=dim,
            dim_mults=multipliers,
            channels=network.image_shape[-1],
            dropout=network.settings.get("dropout", 0.1),
            flash_attn=False,
        )

    def distance(dim: int) -> int:
        with torch.device("meta"):
            return abs(size(build(dim)) - parameters)

    return build(min(range(8, 257, 4), key=distance))


def size(model: torch.nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def _their_name(block: str, rest: list[str], levels: int) -> str:
    inner = {
        "norm_1": "norm1", "conv_1": "conv1", "time": "time_emb_proj", "norm_2": "norm2",
        "conv_2": "conv2", "shortcut": "conv_shortcut", "norm": "group_norm",
        "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0",
    }  # fmt: skip
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}[rest[-1]]
    parts = block.split("_")
    attention = "attentions" if parts[-1] == "attention" else "resnets"
    if block in ("time_1", "time_2"):
        where = f"time_embedding.linear_{parts[1]}"
    elif block in ("conv_in", "conv_out", "norm_out"):
        where = block if block != "norm_out" else "conv_norm_out"
    elif parts[0] == "middle":
        number = "0" if attention == "attentions" else parts[1]
        where = f"mid_block.{attention}.{number}.{inner[rest[0]]}"
    elif parts[0] == "downsample":
        where = f"down_blocks.{parts[1]}.downsamplers.0.conv"
    elif parts[0] == "upsample":
        where = f"up_blocks.{levels - 1 - int(parts[1])}.upsamplers.0.conv"
    else:
        level = int(parts[1]) if parts[0] == "down" else levels - 1 - int(parts[1])
        where = f"{parts[0]}_blocks.{level}.{attention}.{parts[2]}.{inner[rest[0]]}"
    return f"{where}.{leaf}"


def _their_layout(rest: list[str], value: np.ndarray) -> np.ndarray:
    if rest[-1] == "kernel" and value.ndim == 4:  # H, W, in, out
        value = value.transpose(3, 2, 0, 1)
    elif rest[-1] == "kernel":
        value = value.T
        if rest[0] == "shortcut":
            value = value[:, :, None, None]
    return np.ascontiguousarray(value)


class Bench:
    """One network of PyTorch's, its step, forward pass and sampler."""

    def __init__(
        self,
        network: Network,
        model: torch.nn.Module,
        *,
        dtype: str,
        channels_last: bool = False,
        compiled: bool = False,
        precision: str = "",
    ) -> None:
        self.network = network
        self.dtype = getattr(torch, dtype)
        memory = torch.channels_last if channels_last else torch.contiguous_format
        self.memory = memory
        self.model = model.to(DEVICE, memory_format=memory)
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        # On GPUs what is fastest there; on CPUs the defaults, as docs/performance.md has them.
        on_gpu = DEVICE == "cuda"
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=LEARNING_RATE, fused=True if on_gpu else None
        )
        torch.backends.cudnn.benchmark = on_gpu
        if precision:
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
        beta = np.linspace(1e-4, 0.02, _T)
        self.alpha_bar = torch.tensor(np.cumprod(1 - beta), dtype=torch.float32, device=DEVICE)
        h, w, c = network.image_shape
        self.shape = (network.batch_size, c, h, w)
        self.images = torch.randint(0, 256, self.shape, dtype=torch.uint8, device=DEVICE)
        mode = "max-autotune" if on_gpu else "default"
        self.loss = torch.compile(self._loss, mode=mode) if compiled else self._loss
        self.call = torch.compile(self._forward, mode=mode) if compiled else self._forward

    def _forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mixed = self.dtype != torch.float32
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=mixed):
            out = self.model(x, t)
        return out if torch.is_tensor(out) else out.sample

    def _loss(self, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        a = self.alpha_bar[t][:, None, None, None]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        return ((self._forward(x_t, t).float() - eps) ** 2).mean()

    def settle(self) -> None:
        """Waits until what was begun is done."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def compile(self, *, what: Sequence[str] = WHAT) -> dict[str, float]:
        """Returns the seconds of each first call, which compile, or choose kernels."""
        seconds = {}
        for name in what:
            start = time.perf_counter()
            getattr(self, name)()
            self.settle()
            seconds[name] = time.perf_counter() - start
        return seconds

    def train(self) -> None:
        """Runs one step of training."""
        self.model.train()
        x_0 = self.images.float() / 127.5 - 1
        x_0 = x_0.contiguous(memory_format=self.memory)
        t = torch.randint(0, _T, (len(x_0),), device=DEVICE)
        loss = self.loss(x_0, t, torch.randn_like(x_0))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.model.parameters()), 1 - EMA_DECAY)

    @torch.inference_mode()
    def forward(self) -> None:
        """Runs the network alone."""
        self.model.eval()
        x = self.images.float().contiguous(memory_format=self.memory)
        self.call(x, torch.arange(len(x), device=DEVICE))

    @torch.inference_mode()
    def step(self) -> None:
        """Runs one ancestral step, clipped."""
        self.model.eval()
        x = torch.randn(self.shape, device=DEVICE).contiguous(memory_format=self.memory)
        self._ancestral(x, 500)

    def _ancestral(self, x: torch.Tensor, t: int) -> torch.Tensor:
        eps = self.call(x, torch.full((len(x),), t, device=DEVICE)).float()
        a, before = self.alpha_bar[t], self.alpha_bar[t - 1]
        beta = 1 - a / before
        x_0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        mean = (
            before.sqrt() * beta / (1 - a) * x_0 + (a / before).sqrt() * (1 - before) / (1 - a) * x
        )
        return mean + beta.sqrt() * torch.randn_like(x)

    @torch.inference_mode()
    def sample(self) -> None:
        """Draws a whole batch by DDIM in `ddim_steps` steps."""
        self.model.eval()
        x = torch.randn(self.shape, device=DEVICE).contiguous(memory_format=self.memory)
        times = np.linspace(_T - 1, -1, self.network.ddim_steps + 1).round().astype(int)
        for t, s in itertools.pairwise(times):
            eps = self.call(x, torch.full((len(x),), int(t), device=DEVICE)).float()
            a = self.alpha_bar[t]
            before = self.alpha_bar[s] if s >= 0 else torch.ones((), device=DEVICE)
            x_0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
            x = before.sqrt() * x_0 + (1 - before).sqrt() * eps

    def output(self, x: np.ndarray, t: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        """Returns UNet2DModel's output with our weights, for x [B, H, W, C] and the authors' t, in
        our layout."""
        levels = len(self.model.config["block_out_channels"])
        state = {}
        for path, value in weights.items():
            block, *rest = path.split("/")
            state[_their_name(block, rest, levels)] = torch.from_numpy(_their_layout(rest, value))
        self.model.load_state_dict(state)  # refuses a name that is left over or missing
        self.model.eval()
        with torch.inference_mode():
            moved = torch.from_numpy(x).permute(0, 3, 1, 2).to(DEVICE)
            out = self._forward(moved, torch.from_numpy(t).to(DEVICE))
        return out.permute(0, 2, 3, 1).float().cpu().numpy()

    def flops(self) -> float:
        """Returns the FLOPs of a training step's forward and backward pass, counted by PyTorch."""
        from torch.utils.flop_counter import FlopCounterMode

        x = torch.zeros(self.shape, device=DEVICE)
        t = torch.zeros(len(x), dtype=torch.long, device=DEVICE)
        with FlopCounterMode(display=False) as counter:
            self._forward(x, t).float().sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return float(counter.get_total_flops())

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return size(self.model)

    def peak_memory(self) -> int | None:
        """Bytes on an accelerator; None on a CPU."""
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None

    def product(self, n: int) -> Callable[[], None]:
        """Returns a product of two n x n matrices, to be called."""
        a = torch.randn(n, n, device=DEVICE, dtype=self.dtype)

        def multiply() -> None:
            a @ a

        return multiply

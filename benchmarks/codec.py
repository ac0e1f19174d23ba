"""The codec on a model's held-out images: bits and errors of its coders, beside the ideal one.

    python benchmarks/codec.py --model=fashion_mnist --data=/data/tfds --count=64 --out=codec

Codes the first images of the test split: together in one file, and each alone (the first --alone
of them), lossless; decodes the files, one by one, and compares pixels. With them: the ideal
rate-distortion curve of many short steps, the model's bound on the same images (with the reverse
variance fixed_large and, if --moments, the optimal one), and reverse channel coding in the place of
the trellis (of the first --baseline images). Writes curves for `rate_distortion.py`, images.npz and
codec.json to OUT, and prints a table. Seconds are of a whole run, compiling included and not.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np

import ddpm
from ddpm.build.data import held_out
from ddpm.codec import coder, packets, plan, rates, reverse_channel, trellis
from ddpm.codec.container import HEADER_BYTES, read_header
from ddpm.config import with_settings
from ddpm.diffusion.likelihood import bits_per_dim
from ddpm.diffusion.pixels import to_float
from ddpm.files.atomic import check_writable
from ddpm.modes.compress import denoiser_of

CURVE_TIMES = 200
DECIBELS = (18, 22, 26, 30, 35, 40)


def main() -> None:
    """Runs the whole comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits", help="a run folder, or weights by name")
    parser.add_argument("--dataset", default="", help="of the images; the run's own if empty")
    parser.add_argument("--data", default="", help="the folder of the data, if it needs one")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--alone", type=int, default=16)
    parser.add_argument("--baseline", type=int, default=4)
    parser.add_argument("--bound", type=int, default=16, help="images of which the bound is taken")
    parser.add_argument("--moments", action="store_true")
    parser.add_argument("--nu", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("codec"))
    given = parser.parse_args()
    check_writable(given.out)
    model = ddpm.load(given.model)
    data = {"name": given.dataset} if given.dataset else {}
    data |= {"path": given.data} if given.data else {}
    config, _ = with_settings(model.config, data=data)
    source = held_out(config)
    assert source is not None, "no held-out images"
    images = source.read(np.arange(min(given.count, len(source)))).image
    np.savez(given.out / "images.npz", images=images)
    x_0 = jnp.asarray(to_float(images))
    schedule, denoiser = model.schedule, denoiser_of(model._run)
    result: dict[str, Any] = {"model": repr(model), "images": len(images), "nu": given.nu}
    together, curve = code(schedule, denoiser, x_0[None], given.nu)
    result["together"] = together
    alone, of_one = code(schedule, denoiser, x_0[: given.alone, None], given.nu)
    result["alone"] = alone
    write(given.out / "trellis_together.json", curve)
    write(given.out / "trellis_alone.json", of_one)
    write(given.out / "codec.json", result)
    write(given.out / "ideal.json", ideal(schedule, denoiser, x_0))
    result["bound"] = bounds(schedule, denoiser, x_0[: given.bound], given.moments)
    write(given.out / "codec.json", result)
    baseline = reverse_channel_curve(schedule, denoiser, x_0[None, : given.baseline], given.nu)
    write(given.out / "reverse_channel.json", baseline)
    print(json.dumps(result, indent=1))


def bounds(schedule: Any, denoiser: Any, x_0: jax.Array, moments: bool) -> dict[str, Any]:
    """Returns the model's bound on the images, all T terms, bits/dim: the mean and its terms."""
    key, found = jax.random.key(1), {}
    variances = {"fixed_large": ddpm.fixed_large}
    if moments:
        measured = ddpm.second_moments(schedule, denoiser, x_0, key)
        variances["analytic (measured on these images)"] = ddpm.analytic(measured)
    for name, variance in variances.items():
        bound = jax.jit(
            lambda x, v: bits_per_dim(schedule, denoiser, x, key, variance=v), static_argnums=1
        )(x_0, variance)
        found[name] = {"total": float(bound.total.mean()), "L_0": float(bound.decoder.mean())}
    return found


def code(
    schedule: Any, denoiser: Any, x_0: jax.Array, nu: int
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Returns what files of x_0 [F, G, ...] take, lossless, and their mean curve."""
    seconds = []
    for _ in range(2):  # the first time it compiles
        began = time.monotonic()
        files = coder.encode_files(schedule, denoiser, x_0, 0, lossless=True, nu=nu)
        seconds.append(time.monotonic() - began)
    images, exact, decoding = x_0.shape[0] * x_0.shape[1], True, []
    for i, file in enumerate(files):
        began = time.monotonic()
        found = coder.decode(schedule, denoiser, file.data)
        decoding.append(time.monotonic() - began)
        exact &= found.lossless and bool((abs(found.x_0 - x_0[i]) < 1e-6).all())
    last = np.mean([file.curve[-1] for file in files], axis=0)
    layout = read_header(files[0].data).layout
    about = {
        "files": len(files),
        "layout": layout._asdict(),
        "exact": exact,
        "bits_per_dim": 8 * sum(len(f.data) - HEADER_BYTES for f in files) / x_0.size,
        "header_bits_per_dim": 8 * HEADER_BYTES * len(files) / x_0.size,
        "pixels_bits_per_dim": 8 * sum(f.pixel_bytes for f in files) / x_0.size,
        "packets_bits_per_dim": last[0],
        "packets_ideal": last[1],
        "packets_psnr": coder.psnr(last[2]),
        "seconds_per_image": {
            "encoding": seconds[1] / images,
            "encoding, compiling included": seconds[0] / images,
            "decoding": float(np.sum(decoding[1:]) / max(images - x_0.shape[1], 1)),
            "decoding, compiling included": decoding[0] / x_0.shape[1],
        },
    }
    curve = []
    for decibels in DECIBELS:  # files that end there, each with packets of a size of its own
        files = coder.encode_files(schedule, denoiser, x_0, 0, nu=nu, target_psnr=decibels)
        at = np.mean([file.curve[-1] for file in files], axis=0)
        curve.append({"bits_per_dim": at[0], "ideal": at[1], "psnr": coder.psnr(at[2])})
    return about, curve


def ideal(schedule: Any, denoiser: Any, x_0: jax.Array) -> list[dict[str, float]]:
    """Returns the ideal curve of many short steps with matched variance."""
    times = np.unique(plan.even_times(schedule, CURVE_TIMES))
    curve = jax.jit(
        lambda x: rates.ideal_curve(schedule, denoiser, x, jax.random.key(2), times)[1:]
    )(x_0)
    rate, error = (np.asarray(part).mean(axis=0) for part in curve)
    return [
        {"bits_per_dim": float(r), "psnr": coder.psnr(float(e))}
        for r, e in zip(rate, error, strict=True)
        if r < 4
    ]


def reverse_channel_curve(
    schedule: Any, denoiser: Any, x_0: jax.Array, nu: int
) -> list[dict[str, float]]:
    """Returns the curve of the same packets by reverse channel coding: as many bits as its Zipf
    code takes, an ideal coder's length, and those of the strides."""
    layout = plan.choose_layout(schedule, denoiser, x_0, nu=nu, error=4e-4)
    kl = layout.kl * layout.dimensions
    state = packets.start(schedule, layout, 0)
    w, bits, curve = jnp.ones_like(x_0), 0.0, []
    ratio = packets.variance_ratio(layout.kl, w)
    send = jax.jit(lambda key, target: reverse_channel.encode(key, target, kl / np.log(2)))
    receive = jax.jit(lambda key, chosen: reverse_channel.decode(key, chosen, layout.dimensions))
    for number in range(400):
        estimated = packets.estimate(denoiser, state.x_t, state.t)
        error = packets.squared_error(x_0, estimated)
        if number:
            curve.append(
                {"bits_per_dim": bits / layout.dimensions, "psnr": coder.psnr(float(error[0]))}
            )
        gain = packets.snr_gain(x_0, estimated, ratio)
        if bool(packets.too_coarse(schedule, state.t, gain)[0]) or float(error[0]) < 4e-4:
            break
        stride = packets.first_stride(schedule, state.t, gain)
        mean = packets.target_mean(schedule, state.t, stride, x_0 - estimated, ratio)
        key = jnp.asarray([0, number], jnp.uint32)
        order = np.random.default_rng(number).permutation(layout.dimensions)
        flat = trellis.Target(*(x.reshape(1, -1)[:, order] for x in (mean, 1 / ratio)))
        chosen = send(key, flat)
        bits += float(reverse_channel.code_length(chosen, kl / np.log(2))[0])
        bits += packets.CHANGE_BITS
        noise = jnp.zeros((1, layout.dimensions)).at[:, order].set(receive(key, chosen))
        state = packets.step(schedule, state, stride, estimated, ratio, noise.reshape(w.shape))
    return curve


def write(path: Path, content: Any) -> None:
    """Writes JSON."""
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

"""A codec: images as bits, of which every beginning is a coarser image, by a diffusion model."""

from ddpm.codec import bits_back, pixel_coder, rates, reverse_channel, trellis
from ddpm.codec.coder import Decoded, decode, decodings, encode, finished

__all__ = [
    "Decoded",
    "bits_back",
    "decode",
    "decodings",
    "encode",
    "finished",
    "pixel_coder",
    "rates",
    "reverse_channel",
    "trellis",
]

"""A codec: images as bits, of which every prefix is a coarser image, by a diffusion model."""

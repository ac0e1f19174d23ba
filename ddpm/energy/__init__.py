"""Energies and products of densities: what a diffusion model is beside a sampler."""

from ddpm.energy import composition, density, distill, dual, feynman_kac

__all__ = ["composition", "density", "distill", "dual", "feynman_kac"]

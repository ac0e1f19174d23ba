"""Energies and products of densities: what a diffusion model is beside a sampler."""

from ddpm.energy import density

__all__ = ["density"]

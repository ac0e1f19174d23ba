"""Energies and products of densities: what a diffusion model is beside a sampler."""

from ddpm.energy import density, dual

__all__ = ["density", "dual"]

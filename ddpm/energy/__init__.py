"""Energies and products of densities: what a diffusion model is beside a sampler."""

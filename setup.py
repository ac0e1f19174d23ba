"""Packages of the wheel: the library, and the experiments of configs/ within it, as ddpm.configs.

Everything else is in pyproject.toml.
"""

from setuptools import find_namespace_packages, setup

configs = [f"ddpm.{name}" for name in find_namespace_packages(include=["configs*"])]
setup(
    packages=[*find_namespace_packages(include=["ddpm*"]), *configs],
    package_dir={"ddpm.configs": "configs"},
)

"""Imported before ddpm: makes that of this checkout found, whether or not one is installed."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))

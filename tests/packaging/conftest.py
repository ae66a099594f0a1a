"""Lets the tests of the documentation import what reads and builds its pages."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "docs" / "reference"))

"""Lets the tests of drivers import what cuts a server off."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

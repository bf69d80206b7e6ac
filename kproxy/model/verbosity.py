"""Log levels between the standard ones, for messages that `--v` turns on."""

from __future__ import annotations

V2 = 15
"""Shown from `--v=2`: steady-state messages, such as one line per sync. Below INFO (20), above DEBUG (10, `--v=4`)."""

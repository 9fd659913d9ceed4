"""The folder in which commands run."""

from __future__ import annotations

from tests.cli.running import workplace

__all__ = ["workplace"]

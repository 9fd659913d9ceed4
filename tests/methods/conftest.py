"""Asserts in the contract explain themselves as those in test files do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.methods.contract")

"""What tests of composing share: Hydra as users run it."""

from __future__ import annotations

import composing
import pytest


@pytest.fixture
def users_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose each config anew, with nothing of `composing` in Hydra."""
    for owner, name, _, theirs in composing.REPLACED:
        monkeypatch.setattr(owner, name, theirs)

"""Old names of keys: the error for one says what the key is called now.

A key is renamed at its home, in `conf` and in what is kept, and its old name becomes a row here.
"""

from __future__ import annotations

from fedraclora.errors import ConfigError

TEST_KEYS = (
    "data.test_fraction (the share of the samples that is held out), data.test_file (a file) or "
    "data.test_function (package.module:function)"
)
# The old key -> the new one, or which of several by what is meant.
RENAMED = {
    "data.test": TEST_KEYS,
    "data.test_share": "data.test_fraction",
    "data.arguments": "data.parameters",
}


def renamed(key: str) -> ConfigError | None:
    """Build the error for an old key, which names the new one; None for any other key.

    Example:
        >>> print(renamed("data.test_share"))
        data.test_share is called data.test_fraction now
    """
    return ConfigError(f"{key} is called {RENAMED[key]} now") if key in RENAMED else None

"""The choices of the config groups, read from the folder ``conf``."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import CONF

__all__ = ["CONF", "composed", "groups"]


def groups() -> dict[str, dict[str, str]]:
    """List the config groups: group -> choice -> the first comment line of its file."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        lines = path.read_text().splitlines()
        first = next(text for text in lines if "@package" not in text)  # Hydra wants that on line 1
        found.setdefault(path.parent.name, {})[path.stem] = first.lstrip("# ").rstrip()
    return found


def composed(words: Sequence[str]) -> dict[str, object]:
    """Compose the config as the command line would, as a plain, resolved dict.

    Args:
        words: Hydra's overrides, for example ``["method=fedavg", "seed=1"]``, and
            ``--config-dir DIR``.

    Returns:
        The config.

    Raises:
        ConfigError: If it does not compose.
    """
    from hydra import compose, initialize_config_dir

    from experiments.overrides import in_plain_words, plain_of, searched, without_idle

    words = searched(words)

    def once(words: Sequence[str]) -> dict[str, object]:
        cfg = compose("config", overrides=list(words), return_hydra_config=True)
        return plain_of(cfg, cfg.hydra.runtime.choices)

    with (
        in_plain_words(words),
        initialize_config_dir(version_base="1.3", config_dir=str(CONF)),
    ):
        return without_idle(once(words), words, once)

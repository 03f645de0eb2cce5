"""Client side: one Flower ClientApp that serves every method."""

import fedraclora  # noqa: F401 (first: it sets what Flower reads when it is imported)

"""``fedraclora report``: what runs were and what came of them, in one HTML file."""

from fedraclora.imports import import_extra

import_extra("plotly", "A report, or the page of fedraclora watch,")  # all modules here draw by it

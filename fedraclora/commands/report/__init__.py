"""``fedraclora report``: settings, results and figures of runs in one HTML file."""

from fedraclora.imports import import_extra

import_extra("plotly", "A report, or the page of fedraclora watch,")  # every module here needs it

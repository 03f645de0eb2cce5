"""``fedraclora report``: what runs were and what came of them, in one HTML file."""

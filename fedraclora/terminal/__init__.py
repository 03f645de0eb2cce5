"""What a terminal shows: how a run goes, and tables."""

"""Entry points: each module runs as `python -m experiments.<name>` and may import everything."""

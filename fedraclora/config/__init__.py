"""From a plain nested dict to checked, frozen settings, and from those to a task."""

"""Aggregate the updates of a round: means, robust rules, server optimizers."""

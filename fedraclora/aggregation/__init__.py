"""What a server makes of a cohort's updates: means, robust rules, optimizers."""

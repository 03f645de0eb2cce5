"""A package of a data owner: data, model and loss that fedraclora knows nothing of."""

"""Data sources: one file each, with a loader that gives a `fedraclora.data.dataset.DataSet`."""

"""Load data sources, one file each; loaders return a `fedraclora.data.dataset.DataSet`."""

"""Many notebooks: plans, this machine, a Dask cluster."""

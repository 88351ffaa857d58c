"""A study: DPO on the contexts that a model is served, against DPO as TRL renders trajectories."""

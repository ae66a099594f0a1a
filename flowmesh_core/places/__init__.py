"""Where an executor runs: one driver per name in ``ExecutorInfo.places``."""

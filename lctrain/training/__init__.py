"""Training: the objective, the Lightning module, its callbacks, and the run that ties them together."""

"""Slurm: jobs that are checked before they queue, run from a snapshot, come back, and can be looked at."""

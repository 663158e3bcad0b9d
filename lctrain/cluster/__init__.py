"""Slurm jobs: check them before they queue, run them from a snapshot, requeue them, and show their state."""

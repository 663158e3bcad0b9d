"""How attention runs: a kernel prepares a mask once per forward and attends with it in every layer."""

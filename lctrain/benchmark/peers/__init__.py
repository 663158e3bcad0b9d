"""Peers to compare with: programs without lctrain's training code, each in its own process with settings as JSON."""

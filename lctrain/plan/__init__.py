"""Plan what a run will cost, before anything is loaded: parameters, tokens, FLOPs, time, memory."""

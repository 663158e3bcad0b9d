"""What a run will cost, told before anything is loaded: parameters, tokens, FLOPs, memory."""

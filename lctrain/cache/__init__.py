"""KV cache policies, which decide what is kept of earlier tokens: one file each."""

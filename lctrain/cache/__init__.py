"""What a model remembers of the tokens before: KV cache policies, a file each."""

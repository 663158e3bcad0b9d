"""Products with matrices in fp8, and of low rank."""

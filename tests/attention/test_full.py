from transformers import LlamaConfig

CASES = {"full": ("full", {}, lambda layer, h, q, k, n: k <= q)}


def test_fits_every_model_and_length(method_of):
    method_of("full").check(LlamaConfig(), [1, 7, 10**6])

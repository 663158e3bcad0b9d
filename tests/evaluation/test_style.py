import pytest

from lctrain.evaluation.style import tokens


@pytest.mark.parametrize(
    ("number", "text"), [(512, "512"), (1024, "1k"), (1536, "1.5k"), (131072, "128k"), (2**20, "1M")]
)
def test_tokens(number, text):
    assert tokens(number) == text

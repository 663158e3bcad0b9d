"""Tokens are right, made once, and cached whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from lctrain.data import tokenize as module
from lctrain.data.corpus import Corpus
from lctrain.data.table import TokenTable
from lctrain.data.tokenize import tokenize
from lctrain.errors import InputError

CorpusOf = Callable[[dict[str, str]], Corpus]


def test_text_stands_between_bos_and_eos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus_of: CorpusOf
) -> None:
    table = tokenize(corpus_of({"a": "one", "b": "zwölf"}), tokenizer, tmp_path)
    assert [tokenizer.decode(table.tokens(i)) for i in range(2)] == ["<s>one</s>", "<s>zwölf</s>"]
    assert table.names() == ["a", "b"]
    assert table.lengths.tolist() == [5, 8]
    assert table.loss_mask(0) is None


def test_special_tokens_in_a_text_are_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus_of: CorpusOf
) -> None:
    tokens = tokenize(corpus_of({"a": "x</s>y"}), tokenizer, tmp_path).tokens(0).tolist()
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert len(tokens) == 8


def test_many_batches_keep_the_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    table = tokenize(corpus, tokenizer, tmp_path)
    texts = [tokenizer.decode(table.tokens(i), skip_special_tokens=True) for i in range(len(table.lengths))]
    assert texts == [document.text for document in corpus.documents()]
    assert [len(table.tokens(i)) for i in range(len(texts))] == table.lengths.tolist()


def test_datasets_reads_the_cache(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    table = tokenize(corpus, tokenizer, tmp_path)
    dataset = datasets.Dataset.from_file(str(next(tmp_path.glob("*.arrow"))))
    assert dataset[3]["input_ids"] == table.tokens(3).tolist()


def test_empty_documents_are_skipped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus_of: CorpusOf, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert tokenize(corpus_of({"a": "", "b": "x"}), tokenizer, tmp_path).names() == ["b"]
    assert "tokenized 1 documents, 3 tokens; skipped 1 empty ones" in caplog.text


@pytest.mark.parametrize("texts", [{}, {"a": ""}])
def test_an_empty_corpus_is_refused_and_leaves_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus_of: CorpusOf, texts: dict[str, str]
) -> None:
    with pytest.raises(InputError, match="corpus"):
        tokenize(corpus_of(texts), tokenizer, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.*"))


def test_the_cache_is_used_until_corpus_or_tokenizer_change(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus_of: CorpusOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = module._write

    def counting(*args: Any) -> None:
        written.append(args[-1])
        write(*args)

    monkeypatch.setattr(module, "_write", counting)
    corpus = corpus_of({"a": "text"})
    tokenize(corpus, tokenizer, tmp_path)
    tokenize(corpus, tokenizer, tmp_path)
    assert len(written) == 1
    tokenizer.add_tokens(["te"])
    assert len(tokenize(corpus, tokenizer, tmp_path).tokens(0)) == 5
    assert len(written) == 2
    tokenizer.chat_template = "{{ messages }}"
    tokenize(corpus, tokenizer, tmp_path)
    tokenize(corpus_of({"a": "test"}), tokenizer, tmp_path)
    assert len(set(written)) == 4


def test_an_interrupted_run_leaves_no_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    encode, calls = module._encode, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(module, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(corpus, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(InputError, match="not a token cache"):
        TokenTable(tmp_path / "x.arrow")

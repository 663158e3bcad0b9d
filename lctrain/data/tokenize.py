"""Tokenize documents once, on all cores, into an Arrow file that is read by memory mapping."""

import hashlib
import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
from filelock import FileLock
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from lctrain.data.conversation import answer_mask, encode_conversation
from lctrain.data.corpus import Corpus, Document
from lctrain.data.split import unit_hash
from lctrain.data.table import TokenTable
from lctrain.errors import InputError

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "source_hash": pa.float64(),  # of the name without its variant; decides what is held out
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.int8()),  # 1 where the token is to be predicted; null: everywhere
    }
)
FORMAT = 1  # part of the fingerprint: raise it when the meaning of the file changes
PLAIN = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}  # "</s>" in a text is text
BATCH_CHARACTERS = 2**21  # enough to keep every core busy, few enough to fit in memory


def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path) -> TokenTable:
    """Return the tokens of every document, from the cache or newly written there.

    A text gets the tokenizer's BOS in front and its EOS behind, if the tokenizer has them; a conversation is encoded by
    the chat template. The file gets its final name only once it is whole, so that neither an interrupted run nor two
    runs at once can leave half a cache. It is a plain Arrow stream: `datasets.Dataset.from_file` reads it too.
    """
    path = Path(cache_dir).expanduser() / f"{fingerprint(corpus, tokenizer)}.arrow"
    if not path.exists():
        _write(corpus, tokenizer, path)
    return TokenTable(path)


def fingerprint(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest that changes with anything that would change a token."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    parts = (FORMAT, corpus.fingerprint(), backend, tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _write(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    documents = corpus.documents()
    first = next(documents, None)  # errors of the corpus as a whole are raised here, before anything is written
    if first is None:
        raise InputError(f"the corpus is empty: {corpus}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    try:
        with FileLock(lock):  # the ranks of a run all come here at once: one writes, the others wait
            if not path.exists():
                _write_rows(chain([first], documents), corpus, tokenizer, path)
    finally:
        lock.unlink(missing_ok=True)


def _write_rows(documents: Iterator[Document], corpus: Corpus, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    unfinished = path.with_suffix(f".{uuid4().hex}.unfinished")
    num_documents = num_tokens = num_empty = 0
    try:
        with (
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
            _progress() as progress,
        ):
            task = progress.add_task("tokenizing", total=corpus.size_hint(), tokens=0)
            for batch in _batches(documents):
                rows = [row for row in _encode(batch, tokenizer) if row["input_ids"]]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
                num_documents += len(rows)
                num_empty += len(batch) - len(rows)
                num_tokens += sum(len(row["input_ids"]) for row in rows)
                progress.update(task, advance=len(batch), tokens=num_tokens)
        if not num_documents:
            raise InputError(f"the corpus holds no text: {corpus}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    logger.info("tokenized %d documents, %d tokens; skipped %d empty ones", num_documents, num_tokens, num_empty)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + sum(len(message["content"]) for message in document.messages)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Yield one record per document, in order. All texts go to the tokenizer together, whose threads share the work."""
    texts = [document.text for document in batch if not document.messages]
    marked = any(document.answers for document in batch)
    if marked and not tokenizer.is_fast:
        raise InputError("the tokenizer does not tell which characters a token stands for, as marked answers need")
    found = tokenizer(texts, **PLAIN, return_offsets_mapping=marked) if texts else {"input_ids": []}
    encoded = zip(found["input_ids"], found.get("offset_mapping", found["input_ids"]), strict=True)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in batch:
        mask: list[int] | None
        if document.messages:
            ids, mask = encode_conversation(document, tokenizer)
        else:
            text_ids, offsets = next(encoded)
            ids = [*start, *text_ids, *end] if text_ids else []
            within = answer_mask(offsets, document.answers) if document.answers else []
            mask = [0] * len(start) + within + [0] * len(end) if within else None
        yield {
            "name": document.name,
            "source_hash": unit_hash(document.source),
            "input_ids": ids,
            "loss_mask": mask,
        }


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("documents"))
    return Progress(
        *columns, TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn(), console=Console(stderr=True)
    )

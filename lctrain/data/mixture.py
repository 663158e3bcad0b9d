"""Mix several corpora into one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lctrain.data.corpus import Corpus, Document
from lctrain.data.split import unit_hash
from lctrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MixtureCorpus(Corpus):
    """A corpus of the documents of the named `corpora`, each read `epochs[name]` times in one epoch of the mixture.

    With 2, every document comes twice. A fraction keeps that share of the documents, chosen by name.
    """

    corpora: Mapping[str, Corpus]
    epochs: Mapping[str, float]

    def __post_init__(self) -> None:
        if set(self.corpora) != set(self.epochs):
            raise InputError(
                f"epochs names {sorted(self.epochs)}, but the mixture's corpora are {sorted(self.corpora)}"
            )
        if bad := {name: share for name, share in self.epochs.items() if share < 0}:
            raise InputError(f"epochs must not be negative: {bad}")

    def files(self) -> Sequence[Path]:
        return [file for name in self._used() for file in self.corpora[name].files()]

    def size_hint(self) -> int | None:
        hints = [(self.corpora[name].size_hint(), self.epochs[name]) for name in self._used()]
        return (
            None if any(hint is None for hint, _ in hints) else round(sum((hint or 0) * share for hint, share in hints))
        )

    def documents(self) -> Iterator[Document]:
        for name in self._used():
            whole, fraction = divmod(self.epochs[name], 1)
            for document in self.corpora[name].documents():
                yield from [document] * (int(whole) + (unit_hash(f"{name} {document.name}") < fraction))

    def _used(self) -> list[str]:
        return [name for name, share in self.epochs.items() if share > 0]

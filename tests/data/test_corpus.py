"""Corpora read what is there, name it stably, and refuse what they cannot use by file and line."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest

from lctrain.data.corpus import Corpus, Document
from lctrain.data.hub import HubCorpus
from lctrain.data.mixture import MixtureCorpus
from lctrain.data.rows import JsonlCorpus
from lctrain.data.stdlib import StdlibCorpus
from lctrain.data.text import TextCorpus
from lctrain.errors import InputError


def names(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus.documents()]


def jsonl(path: Path, **changes: object) -> JsonlCorpus:
    return JsonlCorpus(path=str(path), patterns=["**/*.jsonl"], text_field="text", **changes)  # type: ignore[arg-type]


def hub(name: str, **changes: object) -> HubCorpus:
    settings = {"config": None, "data_dir": None, "revision": None, "split": "train", "streaming": False}
    return HubCorpus(name=name, text_field="text", **{**settings, "max_documents": None, **changes})  # type: ignore[arg-type]


def test_stdlib_names_are_relative_and_tests_are_left_out() -> None:
    found = names(StdlibCorpus())
    assert "json/decoder.py" in found
    assert not any("site-packages" in name or name.startswith("test/") for name in found)
    assert len(found) == len(set(found)) > 200


def test_stdlib_tests_that_do_not_decode_are_skipped() -> None:
    corpus = StdlibCorpus(include_tests=True)
    if not any("test" in file.parts for file in corpus.files()):
        pytest.skip("this interpreter comes without its tests")
    assert len(names(corpus)) > len(names(StdlibCorpus()))


def test_text_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("b")
    (tmp_path / "a.txt").write_text("ä")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert list(TextCorpus(path=str(tmp_path)).documents()) == [
        Document(name="a.txt", text="ä"),
        Document(name="sub/b.py", text="b"),
    ]
    assert names(TextCorpus(path=str(tmp_path), patterns=["*.txt"])) == ["a.txt"]
    assert names(TextCorpus(path=str(tmp_path / "a.txt"))) == ["a.txt"]


def test_invalid_utf8_is_refused_skipped_or_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(InputError, match=r"bad\.txt: invalid UTF-8 at byte 3"):
        names(TextCorpus(path=str(tmp_path)))
    assert names(TextCorpus(path=str(tmp_path), errors="skip")) == ["good.txt"]
    assert "skipped 1 files" in caplog.text
    assert next(TextCorpus(path=str(tmp_path), errors="replace").documents()).text == "ok �"
    with pytest.raises(InputError, match="choose one of"):
        TextCorpus(path=str(tmp_path), errors="ignore")  # type: ignore[arg-type]


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        TextCorpus(path=str(tmp_path / "nowhere")).fingerprint()
    with pytest.raises(InputError, match="empty"):
        TextCorpus(path=str(tmp_path)).fingerprint()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(InputError, match=r"secret\.txt: cannot be read"):
        names(TextCorpus(path=str(tmp_path)))


def test_file_that_vanished_is_refused_by_name(tmp_path: Path) -> None:
    corpus = TextCorpus(path=str(tmp_path))
    with pytest.raises(InputError, match=r"gone\.txt: cannot be read"):
        corpus.open(tmp_path / "gone.txt")


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two\u2028still two"}\n')
    assert list(jsonl(tmp_path).documents()) == [
        Document(name="a.jsonl:1", text="one"),
        Document(name="a.jsonl:3", text="two\u2028still two"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}", r"bad\.jsonl:2: not JSON"),
        (b"[1, 2]", r"bad\.jsonl:2: a JSON list, expected an object"),
        (b'{"txt": "x"}', r"bad\.jsonl:2: no field 'text'; it has 'txt'"),
        (b'{"text": 3}', r"bad\.jsonl:2: 'text' is int, not text"),
        (b'{"text": "\xff"}', r"bad\.jsonl:2: invalid UTF-8"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        names(jsonl(tmp_path / "bad.jsonl"))


def test_jsonl_skips_only_the_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "fine"}\n')
    assert names(jsonl(tmp_path, errors="skip")) == ["a.jsonl:2"]
    assert "skipped 1 lines" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_reads_a_local_folder_up_to_max_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(5)))
    corpus = hub(str(folder), streaming=streaming, max_documents=3)
    assert list(corpus.documents()) == [Document(name=f"set/default/train/{i}", text=f"text {i}") for i in range(3)]
    before = corpus.fingerprint()
    (folder / "train.jsonl").write_text('{"text": "other"}\n')
    assert corpus.fingerprint() != before


def test_hub_reads_what_save_to_disk_wrote(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"text": ["a", "b"]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "several")
    assert [d.text for d in hub(str(tmp_path / "one")).documents()] == ["a", "b"]
    assert [d.text for d in hub(str(tmp_path / "several")).documents()] == ["a", "b"]
    with pytest.raises(InputError, match="'nosuch', cannot be opened"):
        names(hub(str(tmp_path / "several"), split="nosuch"))


def test_hub_names_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="dataset 'no/such', split 'train', cannot be opened"):
        names(hub("no/such"))
    with pytest.raises(InputError, match="max_documents"):
        hub("no/such", max_documents=0)


def test_hub_names_the_row_behind_which_reading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 3)
    (tmp_path / "train2.jsonl").write_text('{"text": "b"\n')
    with pytest.raises(InputError, match=rf"dataset '{tmp_path}', split 'train', row 3: "):
        names(hub(str(tmp_path), streaming=True))


def test_hub_names_the_row_at_which_the_network_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropping(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", dropping)
    with pytest.raises(InputError, match="dataset 'some/set', split 'train', row 1: ConnectionError"):
        names(hub("some/set", streaming=True))


def test_mixture_reads_each_corpus_its_epochs(corpus: Corpus, corpus_of: Callable[..., Corpus]) -> None:
    one = corpus_of({"x": "x"})
    mixed = names(MixtureCorpus(corpora={"all": corpus, "one": one}, epochs={"all": 0.5, "one": 2}))
    assert mixed.count("x") == 2
    assert 15 < len(mixed) - 2 < 45
    assert names(MixtureCorpus(corpora={"all": corpus, "one": one}, epochs={"all": 1, "one": 0})) == names(corpus)


@pytest.mark.parametrize("epochs", [{"other": 1.0}, {}, {"one": -1.0}])
def test_mixture_refuses_epochs_that_do_not_fit(corpus: Corpus, epochs: dict[str, float]) -> None:
    with pytest.raises(InputError, match="epochs"):
        MixtureCorpus(corpora={"one": corpus}, epochs=epochs)


def test_fingerprint_follows_settings_and_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a")
    plain = TextCorpus(path=str(tmp_path))
    before = plain.fingerprint()
    assert before == TextCorpus(path=str(tmp_path)).fingerprint()
    assert before != TextCorpus(path=str(tmp_path), errors="skip").fingerprint()
    mixed = MixtureCorpus(corpora={"text": plain}, epochs={"text": 1})
    mixed_before = mixed.fingerprint()
    file.write_text("longer")
    assert before != plain.fingerprint()
    assert mixed_before != mixed.fingerprint()

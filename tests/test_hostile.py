"""Files and text from the internet: nothing in them runs, lands elsewhere, fills memory or commands the terminal."""

import gzip
import io
import json
import re
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, error_line, script
from hypothesis import example, given
from hypothesis import strategies as st

import corpora
import utils
from corpora import InputError, printable, read_corpus

TURN = '{"history": ["hi ."], "candidates": ["hello ."]}'
ENTRY = '{"utterances": [' + TURN + "]}"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b5m\u202e\r\u2028"


def of_data(path: Path, content: bytes) -> str:
    """What `read_corpus` complains of."""
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_corpus(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < len(str(path)) + 300
    return str(refusal.value).removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------------ data files


@pytest.mark.parametrize("content, complaint", [
    (f'{{"train": [{ENTRY}, {{"utterances": {"[" * 100_000}', "nested too deeply"),
    ('{"train": ' + '{"a": ' * 100_000, "nested too deeply"),
    (f'{{"train": [{ENTRY}, {"7" * 5000}]}}', "not JSON at line 1, column 80 (a number that long)"),
    (f'{{"train": [{ENTRY}], "train": []}}', "the split train stands there twice"),
    (f'{{"train": [{ENTRY}]}} {{', "not JSON at line 1, column 81 (Extra data); mend"),
    (f'{{"train": [{ENTRY} {ENTRY}]}}', "not JSON at line 1, column 79 (Expecting ',' delimiter); mend"),
    (f'{{"train": [{ENTRY},]}}', "not JSON at line 1, column 79 (Expecting value); mend"),
    ('{"train" []}', "not JSON at line 1, column 10 (Expecting ':' delimiter); mend"),
    ("{train: []}", "not JSON at line 1, column 2 (Expecting property name"),
    ('{"train": [], "val', "not JSON at line 1, column 15 (Unterminated string starting at); it is cut short"),
    (json.dumps({"\x1b[2J": []}), "the split '\\x1b[2J' has no printable, short name"),
    (json.dumps({"\ud800": []}), "the split '\\ud800' has no printable, short name"),
    (json.dumps({"x" * 1000: []}), "the split"),
    (json.dumps({str(number): [] for number in range(101)}), "the file has more than 100 splits"),
    (json.dumps({"train": [{"utterances": [{"history": ["a" * 100_001], "candidates": ["b"]}]}]}),
     "train[0].utterances[0].history[0] has 100,001 letters, more than 100,000; split it"),
])
def test_strange_json_is_refused_with_the_place(tmp_path, content, complaint):
    assert of_data(tmp_path / "data.json", content.encode()).startswith(complaint)


def test_places_count_lines_and_letters_through_pieces(tmp_path, monkeypatch):
    """Whatever the size of the pieces that a file is read in, it is the place that Python's own reader names."""
    good = json.dumps({"train": [json.loads(ENTRY)] * 3, "é€😀": []}, indent=1, ensure_ascii=False)
    for cut in range(2, len(good), 7):
        content = good[:cut] + "\x00" + good[cut:]
        with pytest.raises(json.JSONDecodeError) as own:
            json.loads(content)
        monkeypatch.setattr(corpora, "PIECE", 1 + cut % 11)
        complaint = of_data(tmp_path / "data.json", content.encode())
        assert complaint.startswith(f"not JSON at line {own.value.lineno}, column {own.value.colno} ({own.value.msg})")


def limited(code: str, *arguments, megabytes: int = 700) -> str:
    """Standard error of a Python process that may use so much memory, with ``corpora`` imported."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    prelude = "import sys; from corpora import *; "
    done = subprocess.run([sys.executable, "-c", prelude + code, *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, preexec_fn=limit)
    assert "MemoryError" not in done.stderr
    return done.stderr


READ = "command(lambda: read_corpus(sys.argv[1]) and None)"


def test_a_line_of_a_gigabyte_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "line.json"
    with open(path, "wb") as file:
        file.write(b'{"train": [{"personality": ["')
        for _ in range(64):
            file.write(b"a" * (16 << 20))
    assert path.stat().st_size > 1 << 30
    said = limited(READ, path, megabytes=300)
    path.unlink()
    assert "what begins at line 1, column 12 is longer than 16,777,216 letters; split the dialog" in said


@pytest.mark.parametrize("unit, complaint", [
    (b" ", "unpacks to more than 100 times its size"),
    (b"[" * 40, "nested too deeply"),
    (ENTRY.encode() + b",", "unpacks to more than 100 times its size"),
    (b'{"utterances": "a"},', "train[0].utterances is text, not a list"),
])
def test_a_bomb_is_refused_in_little_memory(tmp_path, unit, complaint):
    with gzip.open(tmp_path / "bomb.json.gz", "wb", compresslevel=6) as file:
        file.write(b'{"train": [')
        for _ in range(200):
            file.write(unit * ((1 << 20) // len(unit)))
    assert complaint in limited(READ, tmp_path / "bomb.json.gz")


def test_devices_end(tmp_path):
    assert "Expecting value" in limited(READ, "/dev/zero")
    assert "longer than 16 MiB" in limited(
        "from readers import read_any; command(lambda: list(read_any(Path(sys.argv[1]))['']) and None)", "/dev/zero")


@given(st.binary(max_size=60), st.integers(1, 9))
@example(b'{"train": [1e', 12)
@example(b'{"train": "\xed\xa0\x80"}', 3)
def test_any_bytes_are_data_or_refused(tmp_path_factory, content, piece):
    path = tmp_path_factory.mktemp("bytes") / "data.json"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", piece)
        try:
            assert isinstance(read_corpus(path), dict)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["train", "valid", "personality", "utterances", "history", "candidates"]), inner, max_size=3),
    max_leaves=12)


@given(JSON, st.integers(1, 50))
def test_any_json_reads_as_pythons_own_reader_reads_it(tmp_path_factory, value, piece):
    path = tmp_path_factory.mktemp("json") / "data.json"
    path.write_text(json.dumps(value))
    text = corpora.Json(iter([path.read_text()[start:start + piece] for start in range(0, 9999, piece)]), path)
    assert repr(text.only_value()) == repr(json.loads(path.read_text()))
    try:
        corpora.check_corpus(value)
    except InputError:
        with pytest.raises(InputError):
            read_corpus(path)
    else:
        assert read_corpus(path) == value


# -------------------------------------------------------------------------------------------------- the terminal


@given(st.text(st.characters()))
def test_printable_text_gives_no_orders(text):
    out = printable(text)
    assert out.isprintable() and len(out) == len(text)
    assert all(new == old or not old.isprintable() for new, old in zip(out, text, strict=True))


def test_names_and_texts_reach_the_terminal_without_escapes(tmp_path):
    """A file's name in an error, split names in a description, a personality, a log line."""
    folder = tmp_path / ESCAPES.replace("/", "")
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps({"train": [json.loads(ENTRY)], "valid": [json.loads(ENTRY)]}))
    (folder / "broken.json").write_text("{")
    said = script("example_entry.py", folder / "data.json", cwd=tmp_path)
    assert "well-formed" in said and printable(said.replace("\n", "")) == said.replace("\n", "")
    line = error_line("example_entry.py", folder / "broken.json", cwd=tmp_path)
    assert line.isprintable() and "not JSON" in line
    strange = tmp_path / "\udcff.json"  # a name that is not UTF-8
    strange.write_bytes((folder / "data.json").read_bytes())
    assert "well-formed" in script("example_entry.py", strange, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})


# ------------------------------------------------------------------------------------------------------ archives


def tar_of(*members: tuple[tarfile.TarInfo, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", **options) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **headers: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, headers
    return info


CONFIG = (member("config.json"), b"{}")
BIG_NAME = tarfile.TarInfo("././@LongLink")
BIG_NAME.type, BIG_NAME.size = tarfile.GNUTYPE_LONGNAME, 2 << 30
ARCHIVES = {
    "up": (tar_of(CONFIG, (member("../../escaped"), b"x")), "outside"),
    "absolute": (tar_of(CONFIG, (member("//tmp/../tmp/escaped"), b"x")), "absolute|outside"),
    "symbolic": (tar_of(CONFIG, (member("a", tarfile.SYMTYPE, ".."), b""), (member("a/escaped"), b"x")), "neither"),
    "hard": (tar_of(CONFIG, (member("escaped", tarfile.LNKTYPE, "/etc/passwd"), b"")), "neither"),
    "device": (tar_of(CONFIG, (member("escaped", tarfile.CHRTYPE), b"")), "neither"),
    "pipe": (tar_of(CONFIG, (member("escaped", tarfile.FIFOTYPE), b"")), "neither"),
    "many": (tar_of(*[(member(f"{number}"), b"") for number in range(1001)]), "more than 1,000 files"),
    "header": (gzip.compress(BIG_NAME.tobuf(tarfile.GNU_FORMAT) + b"a" * (300 << 20), 1), "unlikely size"),
    "pax": (tar_of((member("a", comment="1" * (1 << 20)), b""), format=tarfile.PAX_FORMAT), "unlikely size"),
    "chain": (gzip.compress(b"".join(
        [member("x", tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)] * 3000)), ""),
    "endless": (gzip.compress(tar_of(CONFIG)), ""),
    "nothing": (gzip.compress(b""), ""),
}


@pytest.mark.parametrize("kind", list(ARCHIVES))
def test_hostile_archives_write_nothing_outside(server, tmp_path, kind):
    content, complaint = ARCHIVES[kind]
    server.files[f"/{kind}.tar.gz"] = (content, {})
    with pytest.raises(InputError) as refusal:
        utils.resolve_checkpoint(f"{server.address}/{kind}.tar.gz")
    assert "not a usable .tar.gz" in str(refusal.value) and re.search(complaint, str(refusal.value))
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/escaped").exists()
    assert not list(tmp_path.rglob("*.unpacked"))


def test_an_archive_that_unpacks_to_a_hundred_times_its_size_is_refused(server, tmp_path):
    zeros = io.BytesIO()
    with gzip.open(zeros, "wb", compresslevel=1) as file:
        header = member("model.safetensors")
        header.size = 200 << 20
        file.write(header.tobuf())
        for _ in range(200):
            file.write(bytes(1 << 20))
    server.files["/bomb.tar.gz"] = (zeros.getvalue(), {})
    with pytest.raises(InputError, match="unpacks to more than 100 times its size"):
        utils.resolve_checkpoint(f"{server.address}/bomb.tar.gz")
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 10 << 20


def test_a_server_that_sends_without_end_or_elsewhere_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "LARGEST_DOWNLOAD", 1000)
    server.files["/long"] = (b"a" * 100_000, {})
    with pytest.raises(InputError, match="more than 1,000 bytes came"):
        utils.download(f"{server.address}/long")
    (tmp_path / "secret").write_text("secret")
    server.redirects |= {"/file": f"file://{tmp_path}/secret", "/round": "/round"}
    for name in ("file", "round"):
        with pytest.raises(InputError, match="cannot be downloaded"):
            utils.download(f"{server.address}/{name}")
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()]


def test_names_no_file_system_takes_are_refused_by_the_flag(tmp_path):
    for name in ("a" * 5000, "é" * 200, "a/../" * 999):
        with pytest.raises(InputError, match="no such folder|neither a folder|has no config"):
            utils.read_config(utils.resolve_checkpoint(name))

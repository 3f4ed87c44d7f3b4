"""Test hostile files and text: nothing in them runs, fills memory, writes elsewhere or controls the terminal."""

import gzip
import io
import json
import math
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Evil, error_line, make_checkpoint, script
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import corpora
import downloads
import files
import tables
import utils
from cli import InputError, printable
from corpora import read_corpus
from downloads import download
from inputs import Specials
from pretrained import read_config, resolve_checkpoint
from readers import read_any
from tokenization import get_tokenizer
from weights import add_special_tokens_, load_model, save_model

TURN = '{"history": ["hi ."], "candidates": ["hello ."]}'
ENTRY = '{"utterances": [' + TURN + "]}"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b5m\u202e\r\u2028"


def complaint_about(path: Path, content: bytes) -> str:
    """Return the complaint of `read_corpus` about a file with this content."""
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_corpus(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < len(str(path)) + 300
    return str(refusal.value).removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------------ data files


@pytest.mark.parametrize("content, complaint", [
    (f'{{"train": [{ENTRY}, {{"utterances": {"[" * 100_000}', "nested too deeply"),
    ('{"train": ' + '{"a": ' * 100_000, "nested too deeply"),
    (f'{{"train": [{ENTRY}, {"7" * 5000}]}}', "not JSON at line 1, column 80 (a number with too many digits)"),
    (f'{{"train": [{ENTRY}], "train": []}}', "the split train occurs twice"),
    (f'{{"train": [{ENTRY}]}} {{', "not JSON at line 1, column 81 (Extra data); correct"),
    (f'{{"train": [{ENTRY} {ENTRY}]}}', "not JSON at line 1, column 79 (Expecting ',' delimiter); correct"),
    (f'{{"train": [{ENTRY},]}}', "not JSON at line 1, column 79 (Expecting value); correct"),
    ('{"train" []}', "not JSON at line 1, column 10 (Expecting ':' delimiter); correct"),
    ("{train: []}", "not JSON at line 1, column 2 (Expecting property name"),
    ('{"train": [], "val', "not JSON at line 1, column 15 (Unterminated string starting at); the file is cut short"),
    (json.dumps({"\x1b[2J": []}), "the split '\\x1b[2J' has a name that is empty, longer"),
    (json.dumps({"\ud800": []}), "the split '\\ud800' has a name that is empty, longer"),
    (json.dumps({"x" * 1000: []}), "the split"),
    (json.dumps({"": []}), "the split '' has a name that is empty, longer"),
    (json.dumps({str(number): [] for number in range(101)}), "the file has more than 100 splits"),
    (json.dumps({"train": [{"utterances": [{"history": ["a" * 100_001], "candidates": ["b"]}]}]}),
     "train[0].utterances[0].history[0] has 100,001 characters, more than 100,000; split it"),
])
def test_strange_json_is_refused_with_the_place(tmp_path, content, complaint):
    assert complaint_about(tmp_path / "data.json", content.encode()).startswith(complaint)


def test_errors_name_the_place_across_pieces(tmp_path, monkeypatch):
    """Compare the named place with that of Python's own reader, for pieces of any size."""
    good = json.dumps({"train": [json.loads(ENTRY)] * 3, "é€😀": []}, indent=1, ensure_ascii=False)
    for cut in range(2, len(good), 7):
        content = good[:cut] + "\x00" + good[cut:]
        with pytest.raises(json.JSONDecodeError) as own:
            json.loads(content)
        monkeypatch.setattr(corpora, "PIECE", 1 + cut % 11)
        complaint = complaint_about(tmp_path / "data.json", content.encode())
        assert complaint.startswith(f"not JSON at line {own.value.lineno}, column {own.value.colno} ({own.value.msg})")


def limited(code: str, *arguments, megabytes: int = 700) -> str:
    """Run code with ``cli`` and ``corpora`` imported in a process with limited memory; return its standard error."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    prelude = "import sys; from cli import *; from corpora import *; "
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
    assert "the value at line 1, column 12 is longer than 16,777,216 characters; split the dialog" in said


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


def test_too_long_names_are_one_error_line():
    said = limited("command(lambda: Path('x\x1b' * 200).is_dir())")
    assert said.count("\n") == 1 and "\x1b" not in said
    assert said.startswith("-c: error: x x x") and "cannot be used (File name too long)" in said


def test_endless_devices_are_refused(tmp_path):
    assert "Expecting value" in limited(READ, "/dev/zero")
    assert "longer than 16 MiB" in limited(
        "from readers import read_any; command(lambda: list(read_any(Path(sys.argv[1]))[None]) and None)", "/dev/zero")


@pytest.mark.parametrize("content, complaint", [
    ("a\nb\n" * 6000, "the dialog at line 1 has more than 10,000 utterances; divide it"),
    ("1 a\tb\n" + "".join(f"{number} a\tb\n" for number in range(2, 6000)), "the dialog at line 1 has more"),
    (json.dumps({"turns": ["a", "b"] * 6000}), "the dialog at line 1 has more"),
    (json.dumps({"turns": ["a" * 100_001, "b"]}), "an utterance of the dialog at line 1 has 100,001 characters"),
    (json.dumps({"turns": ["a" * 200] * 9000 + ["b"], "speakers": [0] * 9000 + [1]}), "1,808,999 characters"),
    ('{"turns": ["a", "b"], "speakers": [0, ' + "7" * 5000 + "]}", "a number with too many digits"),
    ("[" * 100_000, "nested too deeply"),
])
def test_oversized_dialogs_are_refused(tmp_path, content, complaint):
    (tmp_path / "own.txt").write_text(content)
    with pytest.raises(InputError, match=complaint):
        list(read_any(tmp_path / "own.txt")[None])


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
def test_json_is_read_as_in_python(tmp_path_factory, value, piece):
    path = tmp_path_factory.mktemp("json") / "data.json"
    path.write_text(json.dumps(value))
    text = corpora.JsonReader(iter([path.read_text()[start:start + piece] for start in range(0, 9999, piece)]), path)
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
def test_printable_text_has_no_control_characters(text):
    out = printable(text)
    assert out.isprintable() and len(out) == len(text)
    assert all(new == old or not old.isprintable() for new, old in zip(out, text, strict=True))


def test_output_has_no_escape_sequences(tmp_path):
    """Put escape sequences into the names of folders and files, and check the messages about them."""
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
    "cut": (tar_of(CONFIG)[:60], ""),
}


@pytest.mark.parametrize("kind", list(ARCHIVES))
def test_hostile_archives_write_nothing_outside(server, tmp_path, kind):
    content, complaint = ARCHIVES[kind]
    server.files[f"/{kind}.tar.gz"] = (content, {})
    with pytest.raises(InputError) as refusal:
        resolve_checkpoint(f"{server.address}/{kind}.tar.gz")
    assert "not a usable .tar.gz" in str(refusal.value) and re.search(complaint, str(refusal.value))
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/escaped").exists()
    assert not list(tmp_path.rglob("*.unpacked"))


def test_an_archive_bomb_is_refused(server, tmp_path):
    zeros = io.BytesIO()
    with gzip.open(zeros, "wb", compresslevel=1) as file:
        header = member("model.safetensors")
        header.size = 200 << 20
        file.write(header.tobuf())
        for _ in range(200):
            file.write(bytes(1 << 20))
    server.files["/bomb.tar.gz"] = (zeros.getvalue(), {})
    with pytest.raises(InputError, match="unpacks to more than 100 times its size"):
        resolve_checkpoint(f"{server.address}/bomb.tar.gz")
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) < 10 << 20


def test_endless_downloads_and_bad_redirects_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "LARGEST_DOWNLOAD", 1000)
    server.files["/long"] = (b"a" * 100_000, {})
    with pytest.raises(InputError, match="more than 1,000 bytes came"):
        download(f"{server.address}/long")
    (tmp_path / "secret").write_text("secret")
    server.redirects |= {"/file": f"file://{tmp_path}/secret", "/round": "/round"}
    for name in ("file", "round"):
        with pytest.raises(InputError, match="cannot be downloaded"):
            download(f"{server.address}/{name}")
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()]


def test_impossible_file_names_are_refused(tmp_path):
    for name in ("a" * 5000, "é" * 200, "a/../" * 999):
        with pytest.raises(InputError, match="no such folder|neither a folder|has no config"):
            read_config(resolve_checkpoint(name))


# ------------------------------------------------------------------------------------------- folders of models


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Save a small random GPT with its tokenizer as a run folder."""
    work = tmp_path_factory.mktemp("models")
    blank = make_checkpoint(work / "blank", n_layer=1, n_embd=16, n_head=2)
    tokenizer, network = get_tokenizer(str(blank)), load_model(str(blank))
    add_special_tokens_(network, tokenizer)
    (work / "run").mkdir()
    tokenizer.save_pretrained(work / "run")
    save_model(network, work / "run")
    return work / "run"


@pytest.fixture
def altered(model_folder, tmp_path):
    """Return a function that copies the run folder, changes a JSON file, writes other files and removes one."""
    def alter(json_file="config.json", change=lambda settings: settings, remove="", **files: bytes) -> str:
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        settings = change(json.loads((folder / json_file).read_text()))
        (folder / json_file).write_text(json.dumps(settings))
        if remove:
            (folder / remove).unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return str(folder)
    return alter


def refusal_of(folder: str) -> str:
    """Return the error message about a folder from which no model can be loaded."""
    with pytest.raises(InputError) as refusal:
        tokenizer, network = get_tokenizer(folder), load_model(folder)
        add_special_tokens_(network, tokenizer)
        tokenizer.encode("hello <eos>")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_the_unaltered_folder_loads(altered):
    folder = altered()
    assert len(get_tokenizer(folder)) == load_model(folder).config.vocab_size


@pytest.mark.parametrize("kind", ["pickle", "zip", "old", "adapter", "training_args"])
def test_pickled_commands_do_not_run(altered, tmp_path, kind):
    trace, file = tmp_path / "trace", io.BytesIO()
    if kind in ("zip", "old"):
        torch.save({"transformer.wte.weight": Evil(trace)}, file, _use_new_zipfile_serialization=kind == "zip")
    evil = file.getvalue() or pickle.dumps(Evil(trace))
    if kind == "training_args":  # what the 2019 script left beside the weights is never read
        folder = altered(model_training_args__bin=evil, optimizer__pt=evil)
        load_model(folder)
    elif kind == "adapter":
        settings = {"peft_type": "LORA", "base_model_name_or_path": altered(), "target_modules": ["c_attn"]}
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        (tmp_path / "adapter" / "adapter_model.bin").write_bytes(evil)
        with pytest.raises(InputError, match="its adapter does not fit"):
            load_model(str(tmp_path / "adapter"))
    else:
        said = refusal_of(altered(remove="model.safetensors", pytorch_model__bin=evil))
        assert "contains code, which is not run" in said
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # the command does run when it is unpickled


def test_code_in_a_model_folder_is_not_run(altered, tmp_path, monkeypatch):
    """Answer "y" on standard input, where transformers asks whether to run the code of a folder."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    code = f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Own: pass\n".encode()
    own = {"auto_map": {name: "own.Own" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}}
    said = refusal_of(altered(change=lambda settings: settings | own | {"model_type": "own"}, own__py=code))
    assert "its config.json cannot be read" in said
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("settings, complaint", [
    ({"n_layer": 10 ** 7}, "num_hidden_layers 10000000, where 1,000 is the most"),
    ({"n_embd": 10 ** 9}, "hidden_size 1000000000, where 65,536 is the most"),
    ({"n_embd": 60_000, "n_layer": 900}, "describes needs at least 48,"),
    ({"n_head": -1}, "num_attention_heads -1"),
    ({"num_labels": 10 ** 9}, "num_labels 1000000000"),
    ({"history_start": 1.5}, "history_start 1.5"),
    ({"summary_type": "mean"}, "do not make a working network"),
    ({"return_dict": False}, "do not make a working network"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights cannot be loaded"),
    ({"model_type": "../../x"}, "its config.json cannot be read"),
    ({"model_type": ["x"]}, "its config.json cannot be read"),
])
def test_absurd_settings_are_refused(altered, settings, complaint):
    assert complaint in refusal_of(altered(change=lambda own: own | settings))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json",
                                  "adapter_config.json"])
def test_deep_and_endless_model_files_are_refused(altered, name):
    folder = Path(altered())
    (folder / name).write_bytes(b'{"a":' * 100_000)
    assert "\n" not in refusal_of(str(folder))
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "is not a regular file of at most 256 MiB" in refusal_of(str(folder)) or name == "config.json"


def test_nan_weights_and_outside_paths_are_refused(altered, tmp_path):
    folder = Path(altered())
    weights = load_file(folder / "model.safetensors")
    for name, value in (("nan", math.nan), ("infinite", math.inf)):
        broken = {key: tensor.clone() for key, tensor in weights.items()}
        next(iter(broken.values())).view(-1)[0] = value
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        assert "some of its weights are not numbers" in refusal_of(str(folder)), name
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../../../dev/zero")}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the folder" in refusal_of(str(folder))


def test_an_adapter_of_itself_is_refused(altered):
    folder = Path(altered())
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert "names itself as the base model" in refusal_of(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 10 ** 9}))
    assert "a rank above" in refusal_of(str(folder))


def test_a_word_with_a_control_tokens_id_is_refused(altered):
    def alias(tokenizer: dict) -> dict:
        ends = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<eos>")
        tokenizer["model"]["vocab"]["hello</w>"] = ends
        tokenizer["model"]["merges"] = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o</w>"]]
        tokenizer["model"]["vocab"] |= {piece: number for number, piece in enumerate(("he", "ll", "hell"), 9)}
        return tokenizer

    assert "turns plain text into control tokens" in refusal_of(altered("tokenizer.json", alias))


def test_text_never_gets_unmarked_control_tokens(altered):
    def ordinary(tokenizer: dict) -> dict:
        for token in tokenizer["added_tokens"]:
            token["special"] = False
        return tokenizer

    tokenizer = get_tokenizer(altered("tokenizer.json", ordinary))
    assert set(Specials.of(tokenizer)).isdisjoint(tokenizer.encode("hi <eos> <speaker1>"))


def test_token_ids_beyond_the_model_are_refused(altered):
    def far(tokenizer: dict) -> dict:
        tokenizer["model"]["vocab"]["hello</w>"] = 1 << 31
        return tokenizer

    assert "tokenizer's ids go to 2,147,483,648" in refusal_of(altered("tokenizer.json", far))


@pytest.mark.parametrize("letters", ["!", "'", "$", " ", "\t", "\n", "()", "é", "😀", "a-"])
def test_long_repeated_text_is_tokenised(model_folder, letters):
    """Tokenise texts each of which once took from half a minute to hours."""
    tokenizer = get_tokenizer(str(model_folder))
    tokenizer.encode(letters * (60_000 // len(letters)))


# ------------------------------------------------------------------------------------------------ the token table


@pytest.fixture(scope="module")
def table_file(tmp_path_factory) -> tuple[Path, Path]:
    """Return a data file and the token table made from it."""
    folder = tmp_path_factory.mktemp("table")
    entry = {"personality": ["i am ."], "utterances": [{"history": ["hi ."], "candidates": ["no .", "hello ."]}]}
    (folder / "data.json").write_text(json.dumps({"train": [entry] * 3, "valid": [entry]}))
    utils.get_dataset(get_tokenizer(str(TINY)), str(folder / "data.json"), str(folder / "cache"))
    return folder / "data.json", next(folder.glob("cache*.safetensors"))


def test_a_damaged_table_is_built_again(table_file, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sync", lambda path: None)  # syncing is slow, and no crash happens here
    data, file = table_file
    whole, tokenizer, rng = file.read_bytes(), get_tokenizer(str(TINY)), random.Random(5)
    good = utils.get_dataset(tokenizer, str(data), str(file.parent / "cache"))
    damaged = [whole[:place] for place in rng.sample(range(len(whole)), 50)]
    for place in rng.sample(range(len(whole)), 50):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:])
    for content in [*damaged, whole + b"x", (2).to_bytes(8, "little") + b"{}"]:
        (tmp_path / file.name).write_bytes(content)
        table = utils.get_dataset(tokenizer, str(data), str(tmp_path / "cache"))
        assert {split: list(table[split]) for split in table} == {split: list(good[split]) for split in good}
        assert table["train"].texts("candidates", 0) == ["no .", "hello ."]
        assert tables.TokenTable(tmp_path / file.name).is_intact()


def test_unreadable_paths_are_named(tmp_path):
    (tmp_path / "round").symlink_to(tmp_path / "round")
    tokenizer = get_tokenizer(str(TINY))
    for place in ("round", "round/data.json", "x" * 300):
        with pytest.raises(InputError, match="cannot be read|no such file"):
            utils.get_dataset(tokenizer, str(tmp_path / place), str(tmp_path / "cache"))
    (tmp_path / "data.json").write_text(json.dumps({"train": [json.loads(ENTRY)]}))
    for place in ("round/cache", "x" * 300):
        with pytest.raises(InputError, match="--dataset_cache .*cannot be written"):
            utils.get_dataset(tokenizer, str(tmp_path / "data.json"), str(tmp_path / place))

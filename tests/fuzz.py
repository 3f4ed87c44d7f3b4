"""Fuzz what reads foreign files and text, guided by coverage, with atheris (libFuzzer for Python).

    make fuzz                                 all targets: some minutes, one line of figures per target
    python tests/fuzz.py json -runs=1000000   one target, with libFuzzer's own flags

Each target asserts what must hold for any input. An input that breaks the assertion, or takes more than 20 seconds or 2
GB, ends the run with an error. It is kept in `.fuzz`, and so is every input that reaches new code; the next run starts
from these inputs.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
WORK = ROOT / ".fuzz"

# Words of the formats: random bytes would rarely spell them.
WORDS = ["train", "valid", "personality", "utterances", "history", "candidates", "turns", "personas", "speakers",
         "dialog", "free_turker_utterance", "guided_turker_utterance", "your persona: ", "partner's persona: ",
         "__SILENCE__", "__eou__", "_comma_", "conv_id,utterance_idx,context,prompt,speaker_idx,utterance",
         "<bos>", "<eos>", "<pad>", "<speaker1>", "<speaker2>", "<unk>", "</w>", "<|endoftext|>", "&lt;eos&gt;"]
ENTRY = {"personality": ["i keep bees ."],
         "utterances": [{"history": ["hi .", "hello .", "how ?"], "candidates": ["no .", "well ."]}]}
BLENDED = [{"personas": [["i mend bikes ."], ["i bake ."]], "free_turker_utterance": "bikes ?",
            "guided_turker_utterance": "no .", "dialog": [[0, "rye ?"], [1, "wheat ."]]}]
SEEDS = {
    "json": [json.dumps({"train": [ENTRY, ENTRY], "valid": [ENTRY]}), json.dumps({"train": []}, indent=1),
             '{"train": [{"utterances": [{"history": ["\\ud83d\\ude00", "\\ud800"], "candidates": [""]}]}]}'],
    "readers": [
        "0" + "1 your persona: i have two dogs.\n2 hi !\thello .\t\tno .|yes .|hello .\n3 dogs ?\ttwo .\n1 a\tb\n",
        "1" + json.dumps({"personas": [["i ."], []], "turns": ["hi", "ho", "ha"], "speakers": [0, 1, 1]}) + "\n",
        "2" + "hi\nho\n\nhi\nho\nha\n", "3" + "Say , Jim ! __eou__ Yes ? __eou__ A beer ? __eou__\n",
        "4" + "conv_id,utterance_idx,context,prompt,speaker_idx,utterance\na,1,b,c,7,d,e,f\na,2,b,c,8,d_comma_,e,f\n",
        "5" + json.dumps(BLENDED), "6" + json.dumps({"train": [ENTRY]}), "61 a\tb\n", "6hi\nho\n"],
    "tokens": ["<bos> i do n't <eos>\n", "<speaker1>", "&lt;eos&gt; don\u2019t \u202e",
               "\u1e9e\u0130 <\u0435os> <|endoftext|>", "\ufeff<\u200beos>", "\uff1ceos\uff1e", "<eos></w>",
               "I'll pay $5. http://a.b/c?d"],
}


def fuzz_json():
    """Check that a data file is refused in one printable line, or read as Python's own reader reads it."""
    with atheris.instrument_imports(include=["corpora"]):
        import corpora
        from cli import InputError, printable
        from corpora import check_corpus, read_corpus

    corpora.PIECE = 64  # small pieces, so that values cross their borders

    def one(data: bytes, path: Path) -> None:
        path.write_bytes(data)
        try:
            corpus = read_corpus(path)
        except InputError as error:
            assert len(printable(str(error))) < 1000
            return
        check_corpus(corpus)
        if data[:2] != b"\x1f\x8b":
            assert repr(corpus) == repr(json.loads(data.decode("utf-8-sig")))

    return one


def fuzz_readers():
    """Check that a file of any layout is refused in one line, or that each of its entries has the format."""
    with atheris.instrument_imports(include=["columns", "corpora", "dialogs", "records", "releases", "rows", "readers",
                                             "shapes", "texts"]):
        import dialogs
        import readers
        from cli import InputError, printable
        from corpora import check_entry

    read = [layout.read for layout in readers.FORMATS.values()]

    def one(data: bytes, path: Path) -> None:
        path.write_bytes(data[1:])
        number = data[0] - ord("0") if data else 0
        try:
            known = 0 <= number < len(read)
            splits = {"": dialogs.make_entries(read[number](path), path)} if known else readers.read_any(path)
            for entries in splits.values():
                for entry in entries:
                    check_entry(entry, "")
        except InputError as error:
            assert len(printable(str(error))) < 1000

    return one


def fuzz_tokens():
    """Check that no text becomes a control token, and that a sequence has just the control tokens of its structure."""
    folders = [ROOT / "models" / "tiny", *(ROOT.parent / "shared" / "golden").glob("run-2019-*")]
    with atheris.instrument_imports(include=["utils", "inputs", "ftfy"]):
        from inputs import Specials, build_input_from_segments
        from tables import tokenize
        from tokenization import get_tokenizer

        tokenizers = [get_tokenizer(str(folder)) for folder in folders]
    controls = [set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | set(Specials.of(tokenizer))
                for tokenizer in tokenizers]

    def one(data: bytes, path: Path) -> None:
        text = data.decode("utf-8", "surrogateescape")  # bytes that are not UTF-8 become lone surrogates
        for tokenizer, control in zip(tokenizers, controls, strict=True):
            ids = tokenizer.encode(text)
            assert control.isdisjoint(ids), ids
            assert tokenize(tokenizer, [text]) == [ids]
            special = Specials.of(tokenizer)
            row = build_input_from_segments([ids, ids], [ids], ids, tokenizer)
            found = [token for token in row["input_ids"] if token in control]
            assert found == [special.bos, special.speaker2, special.speaker1, special.eos]

    return one


TARGETS = {"json": fuzz_json, "readers": fuzz_readers, "tokens": fuzz_tokens}


def fuzz(target: str, flags: list[str]) -> None:
    """Run one target until libFuzzer's ``flags`` end it."""
    corpus, words = WORK / target, WORK / "words"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]):
        (corpus / f"seed-{number}").write_text(seed, "utf-8")
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    memory = Path("/dev/shm")  # in memory, because a disk would be slow
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path, one = Path(folder, "input"), TARGETS[target]()
        atheris.Setup([sys.argv[0], "-timeout=20", "-rss_limit_mb=2048", "-max_len=2000", f"-dict={words}",
                       f"-artifact_prefix={WORK}/{target}-", *flags, str(corpus)], lambda data: one(data, path))
        atheris.Fuzz()


def fuzz_all(flags: list[str]) -> int:
    """Run each target in its own process; print its figures and, if it failed, the end of its output."""
    failed = 0
    for target in TARGETS:
        begun = time.monotonic()
        done = subprocess.run([sys.executable, __file__, target, *flags], capture_output=True, text=True,
                              errors="replace")
        said = done.stdout + done.stderr
        counts = re.findall(r"#(\d+)\s.*cov: (\d+) ft: (\d+) corp: (\d+)", said)
        runs, edges, features, kept = counts[-1] if counts else "????"
        print(f"{target}: {runs} inputs in {time.monotonic() - begun:.0f} s, {edges} edges and {features} features "
              f"reached, {kept} inputs kept: {'FAILED' if done.returncode else 'nothing found'}", flush=True)
        if done.returncode:
            failed = 1
            print(said[-3000:])
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in TARGETS:
        fuzz(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(fuzz_all(sys.argv[1:] or ["-runs=400000"]))

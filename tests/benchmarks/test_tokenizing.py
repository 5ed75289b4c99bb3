from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_every_text_has_the_library_s_tokens(tmp_path: Path) -> None:
    """In a process of its own, for the command sets how many threads the library has."""
    documents = [
        {"text": f"Number {i} of a few\r\n documents. " * 50, "label": "a"} for i in (1, 2)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, documents)))
    command = [sys.executable, "-m", "benchmarks.tokenizing", "--data", str(tmp_path)]
    sizes = ["--megabytes", "0.02", "--rounds", "1", "--piece", "1000"]
    ran = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
    rows = ran.stdout.splitlines()[2:]
    assert rows[0].startswith(f"| {tmp_path.name} | ")
    assert len(rows) == 7
    assert all(row.endswith("| True |") for row in rows)

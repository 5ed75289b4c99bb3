"""docs/batch.md says what the command does: its commands are run, where there are the files."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from gma.service.batch.batch import Batch
from gma.service.batch.cluster import IN_VAIN, PARTS_AT_ONCE
from gma.service.batch.files import KINDS
from gma.service.batch.manifest import Options
from gma.service.batch.output import MANIFEST, OWN, SUCCESS
from gma.service.batch.reader import ROUNDS
from tests.service.asgi import TEXT
from tests.service.batch.archive import answers, write_jsonl
from tests.service.batch.conftest import Run

TEXT_OF_PAGE = (Path(__file__).parents[3] / "docs" / "batch.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("gma batch ")
    for block in re.findall(r"```sh\n(.*?)```", TEXT_OF_PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("gma batch ")
]


@pytest.fixture(autouse=True)
def _archive(batch: Run) -> None:
    """In the folder that `batch` runs in."""
    write_jsonl(Path("letters.jsonl"), [{"text": TEXT}, {"text": ""}])
    mails = {"body": [TEXT], "mail_id": [7], "sent": ["today"]}
    parquet.write_table(pa.table(mails), "mails.parquet")
    Path("logs-1.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": TEXT}).encode()))
    for folder in ("archive/deeper", "letters"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "a.txt").write_text(TEXT)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(batch: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a cluster, which is not here, up to where they would ask for it."""
    words = [word.replace("s3://", "memory://") for word in shlex.split(command)]
    if "--address" not in words:
        if "memory://bucket/mails" in words:
            return  # it is run below, with the cluster's
        result = batch(*words)
        assert (result.status, result.err) == (0, "")
        rows = answers(Path("answers"))
        assert {row["label"] for row in rows if row["error"] is None} <= {"ann", "bob", "cyd"}
        assert rows
        return
    asked: list[object] = []

    def made(self: Batch, inputs: list[str], out: str, *rest: object) -> None:
        self.complete = False
        asked.extend([inputs, out])

    def run(batch: Batch, address: str, workers: int | None, moved: object) -> None:
        asked.extend([address, workers])
        raise ValueError("enough")

    monkeypatch.setattr(Batch, "__init__", made)
    monkeypatch.setattr("gma.service.batch.cluster.run", run)
    assert batch(*words).err == "gma: enough\n"
    workers = int(words[-1]) if "--workers" in words else None
    address = words[words.index("--address") + 1]
    assert asked == [["memory://bucket/mails"], "memory://bucket/answers", address, workers]


def test_columns_are_those_of_answers() -> None:
    table = TEXT_OF_PAGE.partition("| column | |\n|---|---|\n")[2].partition("\n\n")[0]
    first = [row.split("|")[1] for row in table.splitlines()]
    assert tuple(re.findall(r"`(\w+)`", "".join(first))) == OWN


def test_files_and_figures_are_those_of_the_code() -> None:
    for name in re.findall(r"`(\.[\w.]+)`", TEXT_OF_PAGE.partition("Of a folder")[0]):
        assert name in KINDS
    assert f"`--part-bytes` ({Options().part_bytes // 2**20} MiB)" in TEXT_OF_PAGE
    for name in (MANIFEST, SUCCESS):
        assert f"`{name}`" in TEXT_OF_PAGE
    numbers = {2: "two", 3: "three", 4: "four"}
    assert f"{numbers[ROUNDS]} texts for each row are open at a time" in TEXT_OF_PAGE
    assert f"with its own parts, {numbers[PARTS_AT_ONCE]} at a time" in TEXT_OF_PAGE
    assert f"after {numbers[IN_VAIN]} rounds in which no part was done" in TEXT_OF_PAGE


def test_links_are_there() -> None:
    for link in re.findall(r"\]\(([\w/.]+\.md)(?:#[\w-]+)?\)", TEXT_OF_PAGE):
        assert (Path(__file__).parents[3] / "docs" / link).is_file(), link

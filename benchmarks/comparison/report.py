"""What is told of the runs in a folder: tables, and plots against length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

from benchmarks.comparison.runs import SPEED, TASKS, Folder, Result, Run, Wanted, best
from benchmarks.comparison.suite import RECIPES
from benchmarks.figure import BLUE, GREEN, RED, SKY, Line, Panel, draw
from benchmarks.timing import digits, markdown, tokens_name

NOT_RUN = "not run"

COLOURS = {
    "GMA (forgetting)": BLUE,
    "GMA (paper)": SKY,
    "softmax": RED,
    "Mamba-2": GREEN,
    "Gated DeltaNet": "#CC79A7",
}

TITLES = {
    "language": "Language model: bits per byte at two contexts (less is better)",
    "recall": "Associative recall: how many of the keys find their value",
    "states": "State tracking: where the ball is, over the last half of the swaps",
    SPEED: "Speed, memory and state, of the language model",
    "needle": "Needle: eight facts in a book, and a question at the end",
    "listops": "ListOps",
    "books": "Books by author, deep scores alone",
    "imdb": "imdb, as bytes, at 4,096",
    "grain": "Grain: what of an excerpt was shuffled",
}


class Row:
    """One mixer's runs of one task: at the rate that did best on valid with the first seed."""

    def __init__(self, wanted: Wanted, folder: Folder, task: str, mixer: str) -> None:
        self.mixer = mixer
        first = wanted.first(task, mixer)
        tried = [result for result in map(folder.read, first) if result is not None]
        self.rates = f"{len(tried)} of {len(first)}"
        failures = folder.failures()
        self.failure = next((failures[run.name] for run in first if run.name in failures), "")
        self.results: list[Result] = []
        if task == SPEED:
            self.results = tried[:1]
        elif tried:
            rate = best(tried)["rate"]
            seeds: Iterable[Run] = (wanted.run(task, mixer, rate, seed) for seed in wanted.seeds)
            self.results = [result for result in map(folder.read, seeds) if result is not None]

    @property
    def name(self) -> str:
        """The mixer's, marked if its library's kernels were not used."""
        return self.mixer + (" †" if self.plain else "")

    @property
    def plain(self) -> str:
        """Why its library's kernels were not used; nothing if they were, or none was asked for."""
        reasons = (run["kernels"]["why"] for run in self.results)
        return next((why for why in reasons if why), "")

    @property
    def missing(self) -> str:
        """Why there is nothing to tell."""
        return f"failed: {self.failure}" if self.failure else NOT_RUN

    def told(self, column: str) -> str:
        """A figure on test: its mean over the seeds, and half of the spread."""
        values = [run["test"][column] for run in self.results if column in run["test"]]
        if not values:
            return NOT_RUN
        spread = f" ± {(max(values) - min(values)) / 2:.4f}" if values[1:] else ""
        return f"{mean(values):.4f}{spread}"


def tables(wanted: Wanted, folder: Folder) -> str:
    """Return Markdown of all tasks that are wanted."""
    parts = []
    for task in (task for task in TASKS if task in wanted.tasks):
        rows = [Row(wanted, folder, task, mixer) for each, mixer in wanted.rows() if each == task]
        lines = _speed(rows) if task == SPEED else _quality(rows)
        plain = (row for row in rows if row.plain)
        notes = "".join(f"\n† {row.mixer} in plain PyTorch: {row.plain}\n" for row in plain)
        parts.append(f"## {TITLES[task]}\n\n{_budget(task, wanted)}{lines}{notes}")
    return "\n".join(parts)


def _budget(task: str, wanted: Wanted) -> str:
    recipe = RECIPES["language" if task == SPEED else task]
    size = recipe.size
    told = f"{size.layers} layers of {size.width}"
    if task != SPEED:
        told += f"; {recipe.steps:,} steps of {recipe.tokens:,} tokens"
        if recipe.pretraining and wanted.pretrained:
            told += f", after {recipe.pretraining:,} on its own text"
    return f"{told}.\n\n"


def _quality(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(c for row in rows for run in row.results for c in run["test"]))
    head = ["", "M parameters", "rates tried", "rate", "seeds", *columns]
    lines = []
    for row in rows:
        if not row.results:
            lines.append([row.mixer, *[row.missing] * (len(head) - 1)])
            continue
        run = row.results[0]
        size, rate = f"{run['parameters'] / 1e6:.2f}", f"{run['rate']:g}"
        seeds = str(len(row.results))
        lines.append([row.name, size, row.rates, rate, seeds, *map(row.told, columns)])
    return markdown(head, lines)


def _speed(rows: Sequence[Row]) -> str:
    """Return tables of thousand tokens a second, of memory in MB, and of states in KB."""
    kinds = (
        ("training", "training, thousand tokens/s", 1e3),
        ("training_memory", "peak memory of a training step, MB", 1e6),
        ("reading", "reading one document, thousand tokens/s", 1e3),
        ("reading_memory", "peak memory of reading, MB", 1e6),
        ("state", "state of a document, KB", 1e3),
    )
    parts = []
    for kind, title, unit in kinds:
        found = [row.results[0][kind] if row.results else {} for row in rows]
        lengths = sorted({int(length) for each in found for length in each})
        lines = []
        for row, each in zip(rows, found, strict=True):
            cells = [each.get(str(length)) for length in lengths] or [None]
            known = [row.missing if x is None else digits(x / unit) for x in cells]
            lines.append([row.name, *known])
        parts.append(markdown([title, *(map(tokens_name, lengths) if lengths else [""])], lines))
    return "\n".join(parts)


def plots(wanted: Wanted, folder: Folder) -> None:
    """Draw speed and memory against length, and recall against the number of pairs."""
    rows = [Row(wanted, folder, SPEED, mixer) for mixer in wanted.mixers]
    panels = [
        Panel(title, [_line(row.mixer, row.results[0][kind], unit) for row in rows if row.results])
        for title, kind, unit in (
            ("reading: thousand tokens a second", "reading", 1e3),
            ("peak memory of reading, MB", "reading_memory", 1e6),
            ("state of a document, KB", "state", 1e3),
        )
    ]
    if any(panel.lines for panel in panels):
        draw(folder.path / "comparison-speed.svg", "Speed, memory and state against length", panels)
    recall = [
        Row(wanted, folder, "recall", each) for task, each in wanted.rows() if task == "recall"
    ]
    lines = []
    for row in (row for row in recall if row.results):
        found = row.results[0]["test"]
        points = {str(3 * int(column.split()[0])): right for column, right in found.items()}
        lines.append(_line(row.mixer, points, 1.0))
    if lines:
        draw(folder.path / "comparison-recall.svg", "Associative recall, 3 tokens a pair",
             [Panel("share of the keys that find their value", lines)])  # fmt: skip


def _line(mixer: str, points: dict[str, float], unit: float) -> Line:
    known = sorted((float(length), value / unit) for length, value in points.items())
    return Line(mixer, known, COLOURS.get(mixer))

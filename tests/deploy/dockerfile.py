"""A Dockerfile as stages and their instructions, in as much of the language as ours uses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import NamedTuple

ARGUMENT = re.compile(r"\$\{(\w+)\}")


class Instruction(NamedTuple):
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of an exec form, such as ["gma", "serve"]."""
        words: list[str] = json.loads(self.text)
        return words


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


class Dockerfile:
    """Stages by name. Raises ValueError for what can't be read."""

    def __init__(self, text: str) -> None:
        self.stages: dict[str, Stage] = {}
        arguments: dict[str, str] = {}
        stage = None
        for name, rest in _instructions(text):
            if name == "FROM":
                found = re.fullmatch(r"(\S+) AS (\S+)", rest)
                if not found:
                    raise ValueError(f"FROM without a name: {rest}")
                base = ARGUMENT.sub(lambda each: arguments[each[1]], found[1])
                stage = self.stages[found[2]] = Stage(found[2], base)
            elif stage is None:
                if name != "ARG":
                    raise ValueError(f"{name} before the first FROM")
                argument, _, value = rest.partition("=")
                arguments[argument] = value
            else:
                stage.instructions.append(Instruction(name, rest))

    @property
    def external(self) -> set[str]:
        """Images that come from elsewhere."""
        return {stage.base for stage in self.stages.values()} - self.stages.keys()

    def lineage(self, stage: str) -> list[Instruction]:
        """The instructions of a stage after those that it is made FROM."""
        found: list[Instruction] = []
        while stage in self.stages:
            found[:0] = self.stages[stage].instructions
            stage = self.stages[stage].base
        return found

    def last(self, stage: str, name: str) -> Instruction | None:
        """The instruction of that name that holds in a stage."""
        return next((each for each in reversed(self.lineage(stage)) if each.name == name), None)

    def environment(self, stage: str) -> dict[str, str]:
        """What the ENV instructions of a stage set."""
        lines = [each.text for each in self.lineage(stage) if each.name == "ENV"]
        return dict(re.findall(r"(\w+)=(\S+)", " ".join(lines)))


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in filter(str.strip, joined.splitlines()):
        name, _, rest = line.partition(" ")
        if not re.fullmatch("[A-Z]+", name):
            raise ValueError(f"no instruction: {line}")
        found.append((name, rest.strip()))
    return found

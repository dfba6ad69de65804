"""What a part has done, in a file: where the next run goes on, and what was running at a crash."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

Case = Any


@dataclasses.dataclass
class Record:
    """The state of one part."""

    seed: int = 0
    next_step: int = 0
    cases: int = 0
    seconds: float = 0
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """What a part counts beside cases, by name."""
    running: Case = None
    """The case that has begun and has not ended."""

    @classmethod
    def read(cls, path: Path, seed: int) -> Record:
        """The record in a file. There is none yet, or one of another seed: a new one."""
        if path.exists():
            record = cls(**json.loads(path.read_text()))
            if record.seed == seed:
                return record
        return cls(seed)

    def write(self, path: Path) -> None:
        """Replaces the file as a whole, so that it is never half written."""
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(dataclasses.asdict(self)))
        beside.replace(path)

    def fail(self, case: Case, error: str) -> None:
        """Notes that a case fails; its step is not run again."""
        self.failures.append({"case": case, "error": error})
        self.running = None
        self.next_step += 1


def command(part: str, case: Case) -> str:
    """What repeats a case."""
    return f".ci/soak --part {part} --case {shlex.quote(json.dumps(case))}"

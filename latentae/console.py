"""What long work shows: a progress bar on a terminal, nothing but a line now and then elsewhere; tables.

Results go to standard output, everything else to standard error.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

LOG_EVERY_SECONDS = 30.0


def say(text: str) -> None:
    """One line for the user, on standard error, above a running progress bar if there is one."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Progress of ``total`` units (None if unknown): a rich bar on a terminal, a line every 30 s elsewhere.

    Use as a context manager; call ``advance(n, **figures)``; figures such as ``loss=0.12`` stand beside the bar.
    """

    def __init__(self, description: str, total: int | None, unit: str = "images", done: int = 0):
        self.description, self.total, self.unit = description, total, unit
        self.done = self.start_done = done
        self.started = self.last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self.started = self.last_line = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.done, rate="", figures=""
            )
        return self

    def advance(self, count: int = 1, **figures: float | str) -> None:
        self.done += count
        text = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        rate = f"{self.rate:.1f} {self.unit}/s"
        if self._bar:
            self._bar.update(self._task, completed=self.done, rate=rate, figures=text)
        elif time.monotonic() - self.last_line > LOG_EVERY_SECONDS:
            self.last_line = time.monotonic()
            of = f"/{self.total}" if self.total is not None else ""
            say(f"{self.description}: {self.done}{of} {self.unit}, {rate} {text}".rstrip())

    @property
    def rate(self) -> float:
        return (self.done - self.start_done) / max(time.monotonic() - self.started, 1e-9)

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()


def three_figures(value: float) -> str:
    """A number of any size with three significant figures, thousands set apart and whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain text table: first column to the left, the others to the right, floats with four figures."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    lines = [[str(h) for h in header], *[[cell(v) for v in row] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )

"""What the runner shows: progress and tables, by rich where it is installed, else in plain text.

A GPU machine without a network may have torch and nothing else; the benchmarks must run there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    Console = None

Step = Callable[[str, bool], None]  # (what is done now, whether a case has ended)


@contextmanager
def progress(total: int) -> Iterator[Step]:
    """A bar on the standard error; yields the function that moves it."""
    if Console is None or not sys.stderr.isatty():
        done = 0

        def step(text: str, ended: bool) -> None:
            nonlocal done
            if ended:
                done += 1
                print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

        yield step
        return
    columns = (MofNCompleteColumn(), BarColumn(24), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, ended: bar.update(task, description=text, advance=1 if ended else 0)


def table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, to_stderr: bool = False
) -> None:
    """Prints a table; the first column to the left, the others to the right."""
    stream = sys.stderr if to_stderr else sys.stdout
    if Console is None:
        print(f"\n{title}", file=stream)
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        for row in [header, *rows]:
            cells = [
                f"{row[0]:<{widths[0]}}",
                *(f"{x:>{w}}" for x, w in zip(row[1:], widths[1:], strict=True)),
            ]
            print("  ".join(cells), file=stream)
        return
    shown = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        shown.add_row(*row)
    # A file or a pipe has no width: let nothing be cut off there.
    Console(file=stream, width=None if stream.isatty() else 200).print(shown)


def say(text: str, *, to_stderr: bool = False) -> None:
    print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)

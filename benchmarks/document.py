"""The parts of docs/performance.md that scripts write, each between its markers."""

from pathlib import Path


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `name`'s markers, which are added if the file lacks them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    document = path.read_text(encoding="utf-8") if path.exists() else "# Performance\n"
    if begin not in document:
        document = f"{document.rstrip()}\n\n{begin}\n{end}\n"
    head, _, rest = document.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise RuntimeError(f"{path}: {begin} without {end}")
    path.write_text(f"{head}{begin}\n{text}{end}{tail}", encoding="utf-8")

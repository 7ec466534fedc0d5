"""A file of its own for what a command would print: complete, or not there."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

import click

from composite_logstore.inert import paragraph

FORMATS = ("text", "json")


class FormatOrFile(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A format, or the name of a file, which has a suffix or a folder: `run.log`, `run.log.gz`, `logs/run`."""

    name = "format or file"

    def convert(self, value: str | Path, param: click.Parameter | None, context: click.Context | None) -> str | Path:
        """Return the format as text, or the file as a path."""
        if isinstance(value, Path) or value in FORMATS:
            return value
        path = Path(value)
        if path.is_dir():
            self.fail(paragraph(f"'{path}' is a folder; name a file in it"))
        if not (path.suffix or {"/", os.sep} & set(value)):
            formats = " or ".join(FORMATS)
            self.fail(paragraph(f"it is no format; give {formats}, or a file with a suffix, such as '{value}.log'"))
        if not path.parent.is_dir():
            self.fail(paragraph(f"there is no folder '{path.parent}'; make it, or name another"))
        return path


class Download:
    """The file while it is written.

    Attributes:
        path: Its name once it is complete.
        is_complete: Whether it is. Otherwise it is removed.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path = path
        self.is_complete = False
        self._file = file

    def write(self, line: str) -> None:
        """Write a line, which may contain line breaks.

        Raises:
            click.FileError: The disk is full, for example.
        """
        with _in_words(self.path):
            self._file.write(f"{line}\n")


@contextmanager
def download(path: Path, force: bool) -> Iterator[Download]:
    """Write a file under another name, and give it its own if it is complete.

    Args:
        path: The file. It is compressed if its name ends in `.gz`.
        force: Whether to replace a file that is there.

    Raises:
        click.BadParameter: The file is there.
        click.FileError: The file cannot be written.
    """
    if path.exists() and not force:
        where = "'--output'"
        raise click.BadParameter(paragraph(f"'{path}' is there already; '--force' replaces it"), param_hint=where)
    with _in_words(path):
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with open(descriptor, "wb") as raw:
            file = io.TextIOWrapper(_compressed(path, raw), encoding="utf-8", errors="backslashreplace")
            written = Download(path, file)
            try:
                yield written
            finally:
                with _in_words(path):
                    # Writes the last block.
                    file.close()
        if written.is_complete:
            with _in_words(path):
                os.chmod(temporary, 0o666 & ~_umask())
                os.replace(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _compressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(path.stem, "wb", fileobj=raw)) if path.suffix == ".gz" else raw


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.FileError(str(path), error.strerror or type(error).__name__) from None


def _umask() -> int:
    """Return the mode bits that new files do not get. Python can only read them by setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

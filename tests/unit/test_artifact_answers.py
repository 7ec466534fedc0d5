"""What a remote artifact store may answer: so much, within so many seconds, and what makes sense."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from composite_logstore import Bounds
from composite_logstore_artifact.index import load
from composite_logstore_artifact.parts import ListingError, contents_of, open_archive


class Filesystem:
    """An asynchronous filesystem of `fsspec`, as far as it is used."""

    async_impl = True

    def __init__(self, sizes: list[Any], content: bytes = b"") -> None:
        self.sizes = sizes
        self.content = content
        self.timeouts: list[float | None] = []

    def _strip_protocol(self, uri: str) -> str:
        return uri

    def invalidate_cache(self, path: str) -> None:
        """Remember nothing."""

    def ls(self, path: str, detail: bool, timeout: float | None = None) -> list[dict[str, Any]]:
        self.timeouts.append(timeout)
        return [{"name": f"{path}/{number}", "size": size, "type": "file"} for number, size in enumerate(self.sizes)]

    def cat_file(self, path: str, start: int, end: int, timeout: float | None = None) -> bytes:
        self.timeouts.append(timeout)
        return self.content

    def cat_ranges(
        self, paths: list[str], starts: list[int], ends: list[int], on_error: str, timeout: float | None = None
    ) -> list[bytes]:
        self.timeouts.append(timeout)
        return [self.content for _ in paths]


def opened(filesystem: Filesystem) -> Any:
    return open_archive(SimpleNamespace(filesystem=filesystem), "bucket/logs")  # type: ignore[arg-type]


def test_each_request_of_a_reader_has_a_time() -> None:
    filesystem = Filesystem([2, 2], b"ab")
    archive = opened(filesystem)
    assert archive.parts[0].read(0, 2) == b"ab"
    assert contents_of(archive, archive.parts) == [b"ab", b"ab"]
    assert filesystem.timeouts == [Bounds.STORE_SECONDS] * 3


def test_a_listing_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bounds, "OBJECTS", 3)
    assert len(opened(Filesystem([1] * 3)).parts) == 3
    with pytest.raises(ListingError):
        opened(Filesystem([1] * 4))


@pytest.mark.parametrize("size", [-1, None, "7", 1.5])
def test_a_size_that_makes_no_sense_is_an_error_of_the_store(size: Any) -> None:
    with pytest.raises(ListingError):
        opened(Filesystem([1, size]))


@pytest.mark.parametrize("content", [b"", b"a", b"abc", b"a" * 100_000])
def test_an_object_that_is_not_as_large_as_was_said_is_an_error_of_the_store(content: bytes) -> None:
    archive = opened(Filesystem([2, 2], content))
    with pytest.raises(OSError, match="not as large"):
        archive.parts[0].read(0, 2)
    with pytest.raises(OSError, match="not as large"):
        contents_of(archive, archive.parts)


def test_an_index_is_read_to_its_bound(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class File:
        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None:
            """Close nothing."""

        def read(self, size: int = -1) -> bytes:
            read.append(size)
            return b""

    store: Any = SimpleNamespace(open=lambda uri, mode: File())
    assert load(store, "logs", lambda begin, end: b"") == []
    assert read == [Bounds.INDEX_BYTES]

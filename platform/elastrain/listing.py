"""Files below a folder on S3, page by page: what is not asked for is never held, however much lies there.

By obstore, since Arrow holds everything, at 0.7 KB a file, before it gives the first name. A listing that is cut off
goes on behind the last name that came.
"""

from collections.abc import Callable, Iterator
from typing import Any

from elastrain import s3
from elastrain.conditional import key_of, spoken, store_of

PAGE = 1000  # names in an answer, S3's own bound


def files(url: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """Yield path below `url` and size of every file there whose path is wanted; a single file has the path "".

    Raises FileNotFoundError if there is neither, or StorageError.
    """
    root = key_of(url)
    below = len(root) + 1 if root else 0
    pages = _Pages(url, root)
    page = s3.tried("list", url, pages.next)
    if not page:
        yield "", s3.size_of(url)
    while page:
        held = [(str(meta["path"])[below:], int(meta["size"])) for meta in page]
        named = [(path, size) for path, size in held if path and wanted(path)]
        # Where a folder was made by itself, an empty object says so, whose name obstore gives without its last slash.
        folders = s3.folders_among(url, [path for path, size in named if not size])
        yield from (file for file in named if file[0] not in folders)
        page = s3.tried("list", url, pages.next)


class _Pages:
    """The pages of a listing, the next of which may be asked for again."""

    def __init__(self, url: str, root: str) -> None:
        self._url, self._prefix = url, f"{root}/" if root else None
        self._last: str | None = None
        self._stream: Any = None

    def next(self) -> list[Any]:
        """Return the next names, none after the last; raises what `s3.tried` knows how to judge."""
        stream, self._stream = self._stream, None
        with spoken(self._url):
            if stream is None:
                stream = store_of(self._url).list(self._prefix, offset=self._last, chunk_size=PAGE)
            page = list(next(stream, ()))
        self._stream = stream
        self._last = str(page[-1]["path"]) if page else self._last
        return page

"""Where rows come from: digits, files of several kinds, or a version of a table, as splits.

Adding a kind of source: write a function `(rest of the name, options) -> {name: Split}` and enter it in `KINDS`.
"""

from collections.abc import Callable
from dataclasses import replace

from elastrain import storage
from elastrain.data.card import label_of
from elastrain.data.chunks import Arrays, PackOptions, Reader, Split, find, signature
from elastrain.data.csv_files import open_csv
from elastrain.data.dataset import MANIFEST, Dataset
from elastrain.data.hugging_face import open_hugging_face
from elastrain.data.idx import open_digits, open_idx
from elastrain.data.images import open_images
from elastrain.data.lakes import find_table
from elastrain.data.parquet_files import open_files, open_parquet
from elastrain.data.preparation import check_expected
from elastrain.data.tokens import open_text
from elastrain.errors import SpecError
from elastrain.urls import holds_credentials, table_kind

__all__ = ["KINDS", "Arrays", "PackOptions", "Reader", "Split", "identity", "open_source"]

KINDS: dict[str, Callable[[str, PackOptions], dict[str, Split]]] = {
    "digits": lambda _, options: open_digits(options),
    "idx": open_idx,
    "csv": open_csv,
    "parquet": open_parquet,
    "text": open_text,
    "images": open_images,
    "hf": open_hugging_face,
    "delta": lambda rest, options: open_files(rest, find_table(f"delta:{rest}"), options),
    "iceberg": lambda rest, options: open_files(rest, find_table(f"iceberg:{rest}"), options),
}


def open_source(source: str, options: PackOptions) -> dict[str, Split]:
    """Return the splits of a source, `train` first; reads headers and whatever types and classes depend on.

    Raises SpecError if there is no such kind of source, or an option does not apply to it; DataError naming the file
    if it is missing, broken or not what is expected; StorageError if storage does not answer.
    """
    kind, rest = _parts(source)
    _refuse_inapplicable(kind, options)
    splits = KINDS[kind](rest, options)
    columns = next(iter(splits.values())).columns
    check_expected(source, columns, options.prepare.expect)
    classes = options.prepare.classes
    if classes is None:
        return splits
    label = label_of(columns, options.label)
    if label is None:
        raise SpecError(f"{source}: --classes bounds a column of labels, and there is none; name it with --label")
    columns = tuple(replace(c, num_values=classes) if c.name == label else c for c in columns)
    return {name: replace(split, columns=columns) for name, split in splits.items()}


def _refuse_inapplicable(kind: str, options: PackOptions) -> None:
    """Raise SpecError if an option is given that means nothing for this kind of source."""
    asked, tables = options.prepare.identity(), kind in ("csv", "parquet", "hf", "delta", "iceberg")
    refused: tuple[str, ...] = () if tables else ("nulls", "non_finite", "key", "split", "by")
    if kind != "text":
        refused += ("documents", "near")
    elif "documents" in asked:
        refused = ("non_finite", "key", "by", "classes")
        refused += () if asked["documents"].startswith("column:") else ("nulls",)
    else:
        refused += ("duplicates", "classes")
    for name in refused:
        if name in asked:
            hint = ", or say what a document is with --documents" if kind == "text" and name == "duplicates" else ""
            raise SpecError(f"--{name.replace('_', '-')} does not apply to {kind}; leave it out{hint}")


def identity(source: str) -> dict[str, str]:
    """Return what tells a source from others: its kind, its place, and a hash over its files.

    Raises as `open_source` does.
    """
    kind, rest = _parts(source)
    if kind == "digits":
        return {"source": "digits", "files": ""}
    if table_kind(source):
        return {"source": source, "files": signature(find_table(source))}
    return {"source": f"{kind}:{storage.absolute(rest)}", "files": signature(find(rest))}


def parquet_files(source: str) -> list[str]:
    """Return the Parquet files that a source reads as such or as text: they may be shards of a pack.

    Raises as `open_source` does.
    """
    kind, rest = _parts(source)
    if kind not in ("parquet", "text"):
        return []
    files = find(rest)
    return [files.url(file) for file in files.files if file.path.endswith(".parquet")]


def parents(source: str) -> list[dict[str, str]]:
    """Return path and fingerprint of the packed datasets that a source reads: its folder, or folders in there.

    Raises as `open_source` does.
    """
    folders = dict.fromkeys(url.rpartition("/")[0] for url in parquet_files(source))
    packed = (url for url in folders if storage.exists(storage.join(url, MANIFEST)))
    return [{"path": url, "fingerprint": Dataset.open(url).fingerprint} for url in packed]


def read_by_tasks(source: str) -> list[str]:
    """Return the paths and URLs that a source is read from, on whatever machine a task runs; raises SpecError."""
    _, rest = _parts(source)
    return [rest] if rest else []


def refuse_credentials(name: str, url: str) -> None:
    """Raise SpecError, without telling the URL, if it holds a secret: manifests and messages name it for everybody."""
    if holds_credentials(url):
        raise SpecError(f"{name}: the URL holds credentials, and is stored and shown; take them from the environment")


def _parts(source: str) -> tuple[str, str]:
    refuse_credentials("SOURCE", source)
    kind, _, rest = source.partition(":")
    if kind not in KINDS or (not rest) != (kind == "digits"):
        forms = "digits, idx:DIR, csv:PATH, parquet:PATH, text:GLOB, images:DIR, hf:DIR, delta:PATH or iceberg:PATH"
        raise SpecError(f"source {source!r} is none of {forms}; for example text:book.txt")
    return kind, rest

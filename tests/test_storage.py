"""Files and folders: what is listed, what is written, and how every failure reads."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from elastrain import storage
from elastrain.errors import StorageError


class AccountError(Exception):
    """What packages of fsspec raise: nothing that Python knows."""


def listed(folder: Path, **options: Any) -> list[str]:
    return [file.path for file in storage.list_files(str(folder), **options)]


def write(*paths: Path) -> None:
    """Write small files, each with its own name in it."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder one that we may not look into: root, as tests often run, may look into all."""
    scandir, listdir, stat = os.scandir, os.listdir, os.stat

    def close(folder: Path) -> None:
        def refuse(path: Any, call: Callable[..., Any], *rest: Any, inside: bool, **options: Any) -> Any:
            below = isinstance(path, str | os.PathLike) and folder in Path(path).parents
            if below or (inside and str(path) == str(folder)):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *rest, **options)

        monkeypatch.setattr(os, "scandir", lambda path=".": refuse(path, scandir, inside=True))
        monkeypatch.setattr(os, "listdir", lambda path=".": refuse(path, listdir, inside=True))
        monkeypatch.setattr(
            os, "stat", lambda path, *rest, **options: refuse(path, stat, *rest, inside=False, **options)
        )

    return close


# --- listing


def test_every_depth_is_listed_in_order_without_hidden_names(tmp_path: Path) -> None:
    write(*(tmp_path / name for name in ("b/c.txt", "a.txt", "z/y/x.md", ".h/a.txt", "_h/a.txt", "b/.a", "b/_a")))
    assert listed(tmp_path) == ["a.txt", "b/c.txt", "z/y/x.md"]
    assert listed(tmp_path, suffix=(".md", ".rst")) == ["z/y/x.md"]
    assert [file.size_bytes for file in storage.list_files(str(tmp_path))] == [5, 5, 4]
    with pytest.raises(FileNotFoundError):
        listed(tmp_path / "nowhere")


def test_linked_folders_are_listed_once_under_their_own_name_first(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    write(root / "real" / "a.txt", outside / "b.txt", outside / "deep" / "c.txt")
    (root / "again").symlink_to(root / "real")
    (root / "more").symlink_to(outside)
    (root / "more2").symlink_to(outside / "deep")
    (root / ".hidden").symlink_to(outside)
    (outside / "deep" / "up").symlink_to(root)
    (root / "real" / "self").symlink_to(root / "real")
    assert listed(root) == ["more/b.txt", "more/deep/c.txt", "real/a.txt"]
    assert listed(root / "more") == ["b.txt", "deep/c.txt", "deep/up/real/a.txt"]


def test_links_that_lead_nowhere_are_named_unless_nobody_asked(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    (tmp_path / ".#a.txt").symlink_to("somebody@host.123:456")  # what Emacs leaves while a file is changed
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    assert listed(tmp_path, suffix=".txt") == ["a.txt"]
    with pytest.raises(StorageError, match=rf"cannot list {tmp_path}/gone.md: a link that leads nowhere"):
        listed(tmp_path)


def test_files_that_vanish_while_they_are_listed_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "deep" / "c.txt")
    walk = os.walk

    def late(*arguments: Any, **options: Any) -> Iterator[Any]:
        for folder, inner, names in walk(*arguments, **options):
            (tmp_path / "b.txt").unlink(missing_ok=True)
            yield folder, inner, names

    monkeypatch.setattr(os, "walk", late)
    assert listed(tmp_path) == ["a.txt", "deep/c.txt"]


def test_folders_that_may_not_be_read_are_named(tmp_path: Path, closed: Callable[[Path], None]) -> None:
    write(tmp_path / "a.txt", tmp_path / "deep" / "closed" / "b.txt")
    inner = tmp_path / "deep" / "closed"
    closed(inner)
    with pytest.raises(StorageError, match=rf"cannot list {inner}: permission denied: check the owner"):
        listed(tmp_path)
    with pytest.raises(StorageError, match=rf"cannot look up {inner}/b.txt: permission denied"):
        storage.exists(f"{inner}/b.txt")
    with pytest.raises(StorageError, match=rf"cannot list {inner}: permission denied"):
        storage.list_folders(str(inner))
    with pytest.raises(StorageError, match=rf"cannot list {inner}/b.txt: permission denied"):
        storage.list_folders(f"{inner}/b.txt")


# --- writing, moving, removing


def test_a_path_that_cannot_be_written_is_our_sentence_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "file")
    for place in ("file/x", "file/x/y"):
        with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/{place}: a part of the path is a file"):
            storage.put(f"{tmp_path}/{place}", b"")
    with pytest.raises(StorageError, match="a name in the path is too long"):
        storage.put(f"{tmp_path}/{'x' * 300}", b"")
    with pytest.raises(StorageError, match="a name in the path is too long"):
        storage.exists(f"{tmp_path}/{'x' * 300}")
    assert listed(tmp_path) == ["file"]


@pytest.mark.parametrize("store", ["{tmp_path}", "memory://moved"])
def test_moving_replaces_and_leaves_nothing(store: str, tmp_path: Path) -> None:
    root = store.format(tmp_path=tmp_path)
    storage.put(f"{root}/one", b"1")
    storage.put(f"{root}/two", b"2")
    storage.move(f"{root}/one", f"{root}/two")
    storage.move(f"{root}/two", f"{root}/deep/three")
    assert storage.read_bytes(f"{root}/deep/three") == b"1"
    assert [file.path for file in storage.list_files(root)] == ["deep/three"]
    storage.remove(root)
    storage.remove(root)
    assert not storage.exists(root)


class Closed(MemoryFileSystem):  # type: ignore[misc] # fsspec has no types
    """A store whose package has errors of its own."""

    protocol = "closed"

    def __init__(self, *, account: bool = True, **options: Any) -> None:
        if not account:
            raise AccountError("no account\nis known here")
        super().__init__(**options)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise AccountError("Refused: https://host/x?sig=abc.\nRequestId:17")

    cat_file = pipe_file = find = exists = _refuse


@pytest.mark.parametrize("operation", ["read", "write", "list", "look up"])
def test_errors_that_only_a_stores_package_knows_are_one_sentence(operation: str) -> None:
    fsspec.register_implementation("closed", Closed, clobber=True)
    call: dict[str, Callable[[str], Any]] = {
        "read": storage.read_bytes,
        "write": lambda url: storage.put(url, b""),
        "list": storage.list_files,
        "look up": storage.exists,
    }
    with pytest.raises(StorageError) as error:
        call[operation]("closed://data/x")
    assert str(error.value) == (
        f"cannot {operation} closed://data/x: Refused: https://host/x?sig=***; "
        "check the store's address, its credentials and the network"
    )


def test_a_store_whose_package_finds_no_account_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("closed", Closed, clobber=True)
    monkeypatch.setitem(fsspec.config.conf, "closed", {"account": False})
    with pytest.raises(StorageError, match=r"cannot open closed://data/x: no account; check what its package needs"):
        storage.read_bytes("closed://data/x")

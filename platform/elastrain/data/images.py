"""Images: a folder with one folder a class, and encoded images in general, as uint8 arrays of one size."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from elastrain import storage
from elastrain.data.chunks import (
    CHUNK_BYTES,
    PIECE_BYTES,
    WORDS,
    Arrays,
    PackOptions,
    Split,
    attempt,
    class_dtype,
    find,
    first_line,
    named_splits,
    own_split_only,
    refuse_half_named,
)
from elastrain.data.columns import Array, Column
from elastrain.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
GREY, COLOUR = ("1", "L", "LA", "La"), ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
SAMPLED = 64  # images that are looked at to find out whether all are grey


def decode_image(data: bytes, shape: tuple[int, ...] | None, size: int | None, where: str) -> Array:
    """Return an encoded image as uint8 (H, W, 3), or (H, W) if it is grey and `shape` allows.

    With `size` the shorter side becomes `size` and the middle is cut out. Raises DataError naming `where` if the
    bytes are no image, have more than 8 bits a channel, or come out in another shape than `shape`.
    """
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise DataError(f"{where}: reading images needs Pillow: pip install 'elastrain[images]'") from error
    try:
        opened = Image.open(io.BytesIO(data))
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    except Exception as error:  # decoders raise anything on broken bytes
        raise DataError(f"{where}: not a readable image ({first_line(error)}); restore or remove it") from error
    if image.mode not in (*GREY, *COLOUR):
        raise DataError(f"{where}: pixels of mode {image.mode}, not 8 bits a channel; convert it first")
    grey = image.mode in GREY and (shape is None or len(shape) == 2)
    if shape is not None and len(shape) == 2 and not grey:
        raise DataError(f"{where}: a colour image among grey ones; convert it, or the others, first")
    image = image.convert("L" if grey else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    array: Array = np.array(image, dtype=np.uint8)
    if shape is not None and array.shape != shape:
        expected, given = (f"{width}x{height}" for height, width in (shape[:2], array.shape[:2]))
        raise DataError(f"{where}: {given} pixels where the first image has {expected}; pack with --image-size N")
    return array


@dataclass(frozen=True)
class ImageReader:
    """Decodes files; a chunk is a tuple of (path below the root, class index)."""

    root: str
    shape: tuple[int, ...]
    size: int | None
    label_dtype: str

    def read(self, chunk: Sequence[tuple[str, int]]) -> Iterator[Arrays]:
        """Yield images and labels; raises DataError naming the file."""
        step = max(1, PIECE_BYTES // int(np.prod(self.shape)))
        for low in range(0, len(chunk), step):
            part = chunk[low : low + step]
            images = np.empty((len(part), *self.shape), np.uint8)
            for place, (path, _) in enumerate(part):
                url = storage.join(self.root, path)
                images[place] = decode_image(attempt(url, storage.read_bytes), self.shape, self.size, url)
            yield {"image": images, "label": np.array([label for _, label in part], self.label_dtype)}


def open_images(source: str, options: PackOptions) -> dict[str, Split]:
    """Return the splits of `DIR/<class>/…` or `DIR/{train,test|val}/<class>/…`; classes are in the order of names.

    Files are taken in the order of a hash of their paths, so that every row group mixes the classes; the same hash
    splits, if a test fraction is asked for. Images are RGB, or grey if all of a sample of 64 are. Raises DataError if
    there are none, if one lies outside a class folder, or if only some lie in folders that are called train or test.
    """
    files = find(source, SUFFIXES)
    told = {
        file: WORDS.get(file.path.split("/")[0].lower()) if file.path.count("/") > 1 else None for file in files.files
    }
    depth = int(None not in told.values())
    if not depth:
        refuse_half_named(files, told, options)
    named = named_splits(files, options) if depth else None
    if named:
        own_split_only(source, options)
        parts = {name: [file.path for file in part.files] for name, part in named.items()}
    else:
        parts = _hashed([file.path for file in files.files], options.test_fraction or 0.0)
    ordered = sorted((path for part in parts.values() for path in part), key=_key)
    classes = sorted({_class(source, path, depth) for path in ordered})
    shape = _shape(files.root, ordered[:: max(1, len(ordered) // SAMPLED)], options.image_size)
    label_dtype = class_dtype(len(classes))
    columns = (
        Column(name="image", dtype="uint8", shape=shape),
        Column(name="label", dtype=label_dtype, shape=(), num_values=len(classes)),
    )
    index = {name: place for place, name in enumerate(classes)}
    step = max(1, CHUNK_BYTES // int(np.prod(shape)))
    splits = {}
    for name, part in parts.items():
        work = [(path, index[_class(source, path, depth)]) for path in sorted(part, key=_key)]
        splits[name] = Split(
            columns=columns,
            chunks=tuple(tuple(work[low : low + step]) for low in range(0, len(work), step)),
            reader=ImageReader(files.root, shape, options.image_size, label_dtype),
            rows=len(work),
            info={"classes": {"label": classes}},
        )
    return splits


def _key(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()


def _hashed(paths: list[str], fraction: float) -> dict[str, list[str]]:
    if not fraction:
        return {"train": paths}
    test = {path for path in paths if int.from_bytes(_key(path)[:8], "big") < fraction * 2.0**64}
    return {"train": [path for path in paths if path not in test], "test": [path for path in paths if path in test]}


def _class(source: str, path: str, depth: int) -> str:
    parts = path.split("/")
    if len(parts) < depth + 2:
        raise DataError(f"{source}: {path} lies in no class folder; images are expected as DIR/<class>/<file>")
    return parts[depth]


def _shape(root: str, paths: Sequence[str], size: int | None) -> tuple[int, ...]:
    """Return the shape of the first image: grey (H, W) if all of a sample are grey, else (H, W, 3)."""
    shape: tuple[int, ...] = ()
    grey = True
    for path in paths:
        url = storage.join(root, path)
        array = decode_image(attempt(url, storage.read_bytes), None, size, url)
        shape = shape or array.shape[:2]
        grey = grey and array.ndim == 2
    return shape if grey else (*shape, 3)

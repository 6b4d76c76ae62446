"""Text as tokens: bytes or a byte-level BPE learned from the training part, cut where cutting changes no token.

Files follow each other in path order as one text; the held-out part is its end. A reader yields a stream of tokens,
and `Windows` cuts the stream into rows.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from elastrain.data.chunks import (
    CHUNK_BYTES,
    PIECE_BYTES,
    Arrays,
    Files,
    PackOptions,
    Split,
    find,
    grouped,
    read_range,
)
from elastrain.data.columns import Array, Column
from elastrain.errors import DataError, SpecError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEST_FRACTION = 0.1
BPE_PIECE_BYTES = 256 << 10  # an encoding takes some hundred bytes a token while it is made
BPE_CHUNK_BYTES = 4 << 20  # about two seconds of one core
LEARN_BYTES = 256 << 20  # the most text that merges are learned from
LOOK_BYTES = 64 << 10
# A line end between two characters that are no space is a token border of the GPT-2 pattern in any context.
SAFE_CUT, LINE_CUT = re.compile(rb"[^\s]\n(?=[^\s])"), re.compile(rb"\n")


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a file."""

    url: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes of the span."""
        return self.stop - self.start


@dataclass(frozen=True)
class BytesReader:
    """Yields the bytes of spans as tokens 0…255."""

    def read(self, chunk: tuple[Span, ...]) -> Iterator[Arrays]:
        """Yield tokens in pieces; raises DataError if a file is gone or became shorter."""
        for span in chunk:
            for start in range(span.start, span.stop, PIECE_BYTES):
                data = read_range(span.url, start, min(start + PIECE_BYTES, span.stop))
                yield {"tokens": np.frombuffer(data, np.uint8)}


@dataclass(frozen=True)
class BpeReader:
    """Yields the tokens that a tokenizer, given as JSON, makes of spans."""

    tokenizer: str
    dtype: str

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer  # noqa: PLC0415 -- an extra

        return Tokenizer.from_str(self.tokenizer)

    def read(self, chunk: tuple[Span, ...]) -> Iterator[Arrays]:
        """Yield tokens, one piece a span; raises DataError if a file is gone, shorter or no UTF-8."""
        for span in chunk:
            # Not `encode`: the batch form makes no offsets, which take longer than the tokens.
            encoded = self._tokenizer.encode_batch_fast([_text(span)], add_special_tokens=False)[0]
            yield {"tokens": np.asarray(encoded.ids, self.dtype)}


class Windows:
    """Cuts a stream of tokens into rows of `context` + 1, each beginning with the last token of the one before."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.rest: Array = np.empty(0, np.uint8)

    def push(self, tokens: Array) -> Array:
        """Return the rows, of shape (rows, context + 1), that are complete with these tokens."""
        stream = np.concatenate([self.rest.astype(tokens.dtype), tokens])
        rows = max(0, (len(stream) - 1) // self.context)
        self.rest = stream[rows * self.context :].copy()
        if not rows:
            return np.empty((0, self.context + 1), tokens.dtype)
        return np.lib.stride_tricks.sliding_window_view(stream, self.context + 1)[:: self.context]

    @property
    def dropped(self) -> int:
        """Tokens at the end that no row predicts; the first of what is left was predicted by the row before."""
        return max(0, len(self.rest) - 1)


def open_text(source: str, options: PackOptions) -> dict[str, Split]:
    """Return the splits of text files; raises DataError if there are none, too little text, or no UTF-8 for BPE."""
    files = find(source)
    fraction = TEST_FRACTION if options.test_fraction is None else options.test_fraction
    cut = _text_cut(files, fraction)
    parts = {"train": _spans(files, 0, cut), "test": _spans(files, cut, files.size_bytes)}
    for name, spans in parts.items():
        if name == "test" and not fraction:
            continue
        size = sum(span.size for span in spans)
        if size <= options.context and options.tokenizer == "bytes":
            raise DataError(
                f"{source}: the {name} part has {size} bytes, and one row of --context {options.context} takes "
                f"{options.context + 1}; give more text, a smaller --context or another --test-fraction"
            )
    kept = {name: spans for name, spans in parts.items() if name == "train" or fraction}
    return _as_bytes(kept, options) if options.tokenizer == "bytes" else _as_bpe(source, kept, options)


def _as_bytes(parts: dict[str, list[Span]], options: PackOptions) -> dict[str, Split]:
    column = Column(name="tokens", dtype="uint8", shape=(options.context + 1,), num_values=256)
    return {
        name: Split(
            columns=(column,),
            chunks=tuple(grouped(_pieces(spans, CHUNK_BYTES, None), lambda span: span.size, CHUNK_BYTES)),
            reader=BytesReader(),
            rows=(sum(span.size for span in spans) - 1) // options.context,
            window=options.context,
            info={"tokenizer": "bytes"},
        )
        for name, spans in parts.items()
    }


def _as_bpe(source: str, parts: dict[str, list[Span]], options: PackOptions) -> dict[str, Split]:
    size = int(options.tokenizer.removeprefix("bpe:"))
    if size < 257:
        raise SpecError(
            f"tokenizer bpe:{size} learns nothing: the 256 bytes come first, so choose a size of 257 or more"
        )
    pieces = {name: _pieces(spans, BPE_PIECE_BYTES, SAFE_CUT) for name, spans in parts.items()}
    tokenizer = learn_bpe(source, pieces["train"], size)
    vocabulary = tokenizer.get_vocab_size()
    dtype = "uint16" if vocabulary <= 65536 else "int32"
    column = Column(name="tokens", dtype=dtype, shape=(options.context + 1,), num_values=vocabulary)
    stored = tokenizer.to_str()
    return {
        name: Split(
            columns=(column,),
            chunks=tuple(grouped(spans, lambda span: span.size, BPE_CHUNK_BYTES)),
            reader=BpeReader(stored, dtype),
            window=options.context,
            info={"tokenizer": "../tokenizer.json", "vocabulary": vocabulary},
            files={"tokenizer.json": tokenizer.to_str(pretty=True).encode()},
        )
        for name, spans in pieces.items()
    }


def learn_bpe(source: str, spans: Sequence[Span], size: int) -> "Tokenizer":
    """Return a byte-level BPE learned from spans, of 256 MiB spread evenly if they are more; deterministic.

    Raises DataError if the `tokenizers` package is missing or the text is no UTF-8.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise DataError(f"{source}: bpe needs the tokenizers package: pip install 'elastrain[text]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    every = -(-sum(span.size for span in spans) // LEARN_BYTES) or 1
    tokenizer.train_from_iterator((_text(span) for span in spans[::every]), trainer)
    return tokenizer


def _text(span: Span) -> str:
    try:
        return read_range(span.url, span.start, span.stop).decode()
    except UnicodeDecodeError as error:
        place = span.start + error.start
        raise DataError(f"{span.url}: byte {place} is no UTF-8; convert the file, or use --tokenizer bytes") from error


def _text_cut(files: Files, fraction: float) -> int:
    """Return where the held-out part begins in the text of all files: never inside a UTF-8 character."""
    cut = files.size_bytes - int(files.size_bytes * fraction)
    for span in _spans(files, cut, min(cut + 1, files.size_bytes)):
        start = max(0, span.start - 3)
        before = read_range(span.url, start, span.stop)
        while cut > 0 and len(before) > 1 and before[-1] & 0xC0 == 0x80:
            before, cut = before[:-1], cut - 1
    return cut


def _spans(files: Files, start: int, stop: int) -> list[Span]:
    """Return the spans of files that hold bytes [start, stop) of the whole text."""
    spans, begin = [], 0
    for file in files.files:
        low, high = max(start - begin, 0), min(stop - begin, file.size_bytes)
        if low < high:
            spans.append(Span(files.url(file), low, high))
        begin += file.size_bytes
    return spans


def _pieces(spans: Sequence[Span], size: int, safe: re.Pattern[bytes] | None) -> list[Span]:
    """Cut spans into pieces of about `size` bytes, at line ends if `safe` is a pattern of good ones."""
    pieces = []
    for span in spans:
        start = span.start
        while start < span.stop:
            stop = min(start + size, span.stop)
            if safe and stop < span.stop:
                stop = _line_end(span, stop, safe)
            pieces.append(Span(span.url, start, stop))
            start = stop
    return pieces


def _line_end(span: Span, place: int, safe: re.Pattern[bytes]) -> int:
    """Return a good place to cut at or after `place`: a safe line end, any line end, or the border of a character."""
    data = read_range(span.url, place, min(place + LOOK_BYTES, span.stop))
    for pattern in (safe, LINE_CUT):
        found = pattern.search(data)
        if found:
            return place + found.end()
    while data and data[0] & 0xC0 == 0x80:
        place, data = place + 1, data[1:]
    return place

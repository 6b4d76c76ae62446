"""Text as tokens: bytes or a byte-level BPE learned from the training part, cut where cutting changes no token.

Files follow each other in path order as one text; the held-out part is its end. A reader yields a stream of tokens,
and `Windows` cuts the stream into rows. Where there are documents, a mark follows each, and no token is dropped.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from elastrain.data.chunks import (
    CHUNK_BYTES,
    PIECE_BYTES,
    Arrays,
    Files,
    PackOptions,
    Removed,
    Split,
    find,
    grouped,
    read_range,
)
from elastrain.data.columns import Array, Column
from elastrain.data.documents import Chunk, Documents, find_documents
from elastrain.errors import DataError, SpecError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEST_FRACTION = 0.1
BPE_PIECE_BYTES = 256 << 10  # an encoding takes some hundred bytes a token while it is made
BPE_CHUNK_BYTES = 4 << 20  # about two seconds of one core
LEARN_BYTES = 256 << 20  # the most text that merges are learned from
LOOK_BYTES = 64 << 10
END = "<|endoftext|>"  # the token after each document; text that reads like it is text
BYTES_END = 256  # the same where tokens are bytes
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


@dataclass(frozen=True)
class DocumentReader:
    """Yields the tokens of documents, the token `end` after each; `tokenizer` is JSON, None where tokens are bytes."""

    documents: Documents
    tokenizer: str | None
    dtype: str
    end: int

    def read(self, chunk: Chunk) -> Iterator[Arrays | Removed]:
        """Yield tokens in pieces, and what was removed; raises DataError naming a file that cannot be read."""
        waiting, size = list[Array](), 0
        for document in self.documents.read(chunk):
            if isinstance(document, Removed):
                yield document
                continue
            for tokens in self._tokens(document.data or b"", f"{document.url}: the document at {document.place}"):
                waiting.append(tokens)
                size += tokens.nbytes
                if size > PIECE_BYTES:
                    yield {"tokens": np.concatenate(waiting)}
                    waiting, size = [], 0
        if waiting:
            yield {"tokens": np.concatenate(waiting)}

    def _tokens(self, data: bytes, where: str) -> Iterator[Array]:
        if self.tokenizer is None:
            yield np.frombuffer(data, np.uint8).astype(self.dtype)
        else:
            for part in _safe_parts(data):
                try:
                    text = part.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{where} is no UTF-8; convert the file, or use --tokenizer bytes") from error
                encoded = self._bpe.encode_batch_fast([text], add_special_tokens=False)[0]
                yield np.asarray(encoded.ids, self.dtype)
        yield np.array([self.end], self.dtype)

    @cached_property
    def _bpe(self) -> "Tokenizer":
        from tokenizers import Tokenizer  # noqa: PLC0415 -- an extra

        made = Tokenizer.from_str(str(self.tokenizer))
        made.encode_special_tokens = True  # a document in which the mark is written does not end there
        return made


class Windows:
    """Cuts a stream of tokens into rows of `context` + 1, each beginning with the last token of the one before.

    `end` is the token after each document, None if there are none.
    """

    def __init__(self, context: int, end: int | None = None) -> None:
        self.context, self.end = context, end
        self.rest: Array = np.empty(0, np.uint8)
        self.tokens = self.documents = self.padding = 0

    def push(self, tokens: Array) -> Array:
        """Return the rows, of shape (rows, context + 1), that are complete with these tokens."""
        self.tokens += len(tokens)
        if self.end is not None:
            self.documents += int(np.count_nonzero(tokens == self.end))
        stream = np.concatenate([self.rest.astype(tokens.dtype), tokens])
        rows = max(0, (len(stream) - 1) // self.context)
        self.rest = stream[rows * self.context :].copy()
        if not rows:
            return np.empty((0, self.context + 1), tokens.dtype)
        return np.lib.stride_tricks.sliding_window_view(stream, self.context + 1)[:: self.context]

    def last(self) -> Array:
        """Return the row that is left at the end, filled up with the mark, of shape (0 or 1, context + 1).

        Where there are no documents it is not returned: `dropped` says how many tokens it would have.
        """
        if self.end is None or not self.dropped:
            return np.empty((0, self.context + 1), self.rest.dtype)
        self.padding = self.context + 1 - len(self.rest)
        row = np.concatenate([self.rest, np.full(self.padding, self.end, self.rest.dtype)])
        self.rest = row[-1:]
        return row[None]

    @property
    def dropped(self) -> int:
        """Tokens at the end that no row predicts; the first of what is left was predicted by the row before."""
        return max(0, len(self.rest) - 1)

    def facts(self) -> dict[str, Any]:
        """Return what a card and a manifest say of documents; empty if there are none."""
        if self.end is None:
            return {}
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "end_of_document": self.end,
            "padding": self.padding,
        }


def open_text(source: str, options: PackOptions) -> dict[str, Split]:
    """Return the splits of text files; raises DataError if there are none, too little text, or no UTF-8 for BPE."""
    if options.prepare.documents is not None:
        return _open_documents(source, options)
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
    size = _size_of(options.tokenizer, 0)
    pieces = {name: _pieces(spans, BPE_PIECE_BYTES, SAFE_CUT) for name, spans in parts.items()}
    every = -(-sum(span.size for span in pieces["train"]) // LEARN_BYTES) or 1
    tokenizer = learn_bpe(source, (_text(span) for span in pieces["train"][::every]), size)
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


def _open_documents(source: str, options: PackOptions) -> dict[str, Split]:
    """Return the splits of documents; raises DataError if no file has one, or one is no UTF-8 where BPE needs it."""
    parts = find_documents(source, options)
    tokenizer, values, end = None, BYTES_END + 1, BYTES_END  # of bytes
    info: dict[str, Any] = {"tokenizer": "bytes"}
    files: dict[str, bytes] = {}
    if options.tokenizer != "bytes":
        reader, chunks = parts["train"]
        learned = learn_bpe(source, _some_texts(reader, chunks), _size_of(options.tokenizer, 1), [END])
        tokenizer, values, end = learned.to_str(), learned.get_vocab_size(), learned.get_vocab()[END]
        info = {"tokenizer": "../tokenizer.json", "vocabulary": values}
        files = {"tokenizer.json": learned.to_str(pretty=True).encode()}
    dtype = "uint16" if values <= 65536 else "int32"
    column = Column(name="tokens", dtype=dtype, shape=(options.context + 1,), num_values=values)
    return {
        name: Split(
            columns=(column,),
            chunks=chunks,
            reader=DocumentReader(documents, tokenizer, dtype, end),
            window=options.context,
            end=end,
            info=info,
            files=files,
        )
        for name, (documents, chunks) in parts.items()
    }


def _some_texts(documents: Documents, chunks: Sequence[Chunk]) -> Iterator[str]:
    """Yield documents to learn from, of chunks spread evenly: about `LEARN_BYTES` if there are more."""
    size = sum(stretch.stop - stretch.start for chunk in chunks for stretch in chunk.stretches)
    for chunk in chunks[:: -(-size // LEARN_BYTES) or 1]:
        for document in documents.read(chunk):
            if isinstance(document, Removed):
                continue
            try:
                yield (document.data or b"").decode()
            except UnicodeDecodeError as error:
                where = f"{document.url}: the document at {document.place}"
                raise DataError(f"{where} is no UTF-8; convert the file, or use --tokenizer bytes") from error


def _safe_parts(data: bytes) -> Iterator[bytes]:
    """Cut a document where no token is cut if there is such a place, so that its encoding does not take much memory."""
    start = 0
    while start < len(data):
        stop = start + BPE_PIECE_BYTES
        found = next(filter(None, (cut.search(data, stop, stop + LOOK_BYTES) for cut in (SAFE_CUT, LINE_CUT))), None)
        stop = found.end() if found else stop
        while stop < len(data) and data[stop] & 0xC0 == 0x80:
            stop += 1
        yield data[start:stop]
        start = stop


def _size_of(tokenizer: str, marks: int) -> int:
    """Return the size of a vocabulary; raises SpecError if nothing is learned besides bytes and marks."""
    size = int(tokenizer.removeprefix("bpe:"))
    if size <= 256 + marks:
        raise SpecError(
            f"tokenizer bpe:{size} learns nothing: the 256 bytes come first, so choose a size of {257 + marks} or more"
        )
    return size


def learn_bpe(source: str, texts: Iterator[str], size: int, marks: Sequence[str] = ()) -> "Tokenizer":
    """Return a byte-level BPE learned from texts, with `marks` as tokens that no text has; deterministic.

    Raises DataError if the `tokenizers` package is missing, and what reading the texts raises.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise DataError(f"{source}: bpe needs the tokenizers package: pip install 'elastrain[text]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(marks),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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

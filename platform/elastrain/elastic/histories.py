"""Histories: what is done to a run while it trains, as a line of text. Neither Ray nor torch is needed to read one.

```
4, kill@30, 2, 3, drain@80, 1
```
A bare number is the number of workers from the next step boundary on; the first one begins the run. `WORD@N` happens
when step N is reached. Each waits until those before it are done: a number, when that many train; a loss, when
training goes on without who was lost.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from elastrain.errors import SpecError
from elastrain.spec.problems import nearest

Word = Literal["kill", "stop", "drain", "node"]
WORDS: tuple[Word, ...] = get_args(Word)
ALLOWED = "a number of workers, kill@N (SIGKILL), stop@N (SIGSTOP), drain@N (a node's SIGTERM) or node@N (a node's end)"
ITEM = re.compile(r"(?P<size>[0-9]{1,9})|(?P<word>[A-Za-z]+)@(?P<step>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Event:
    """One item of a history: `word` is None for a number of workers; `number` counts those, or is a step."""

    word: Word | None
    number: int

    def __str__(self) -> str:
        return f"{self.word}@{self.number}" if self.word else str(self.number)


@dataclass(frozen=True, slots=True)
class History:
    """Events in the order in which they are carried out; the first is a number of workers."""

    events: tuple[Event, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.events))

    @property
    def first(self) -> int:
        """Workers at the beginning."""
        return self.events[0].number

    @property
    def sizes(self) -> tuple[int, ...]:
        """For each event the number of workers that is asked for once it is done."""
        found: list[int] = []
        for event in self.events:
            found.append(found[-1] if event.word else event.number)
        return tuple(found)

    @property
    def most(self) -> int:
        """The largest number of workers at any time."""
        return max(self.sizes)

    @property
    def hits_nodes(self) -> bool:
        """Whether nodes come to harm, so that each worker needs one of its own."""
        return any(event.word in ("drain", "node") for event in self.events)

    def remarks(self) -> list[str]:
        """Return a sentence for each event that leaves nobody who could go on at once."""
        alone = [event for event, size in zip(self.events, self.sizes, strict=True) if event.word and size == 1]
        then = {"drain": "it hands its state to the next one, or commits it first"}
        back = "the next one goes on from the last checkpoint and does the steps since again"
        return [f"{event} hits the only worker: {then.get(event.word or '', back)}" for event in alone]


def parse_history(text: str, *, slots: int, steps: int) -> History:
    """Return the history that `text` says, for a run of so many slots and steps.

    Raises:
        SpecError: with the column, what is wrong there and what is allowed.

    >>> parse_history("4, kill@30, 2", slots=6, steps=200).sizes
    (4, 4, 2)
    """
    found: list[Event] = []
    for column, item in _items(text):
        problem = _problem(item, found, slots=slots, steps=steps)
        if problem:
            raise SpecError(f'history "{text}", column {column}: {problem}')
        found.append(_event(item))
    history = History(tuple(found))
    last = max((event.number for event in found if event.word), default=0)
    after = next((n for n, event in enumerate(reversed(found)) if event.word), len(found))
    if last + after > steps:
        raise SpecError(f'history "{text}": each number needs a step of its own, and {steps} steps leave it none')
    return history


def random_history(seed: int, *, slots: int, steps: int) -> History:
    """Return a valid history, always the same for a seed: losses of all kinds among up to `slots` workers.

    >>> str(random_history(7, slots=6, steps=200)) == str(random_history(7, slots=6, steps=200))
    True
    """
    assert slots >= 1, "a worker needs a slot"
    assert steps >= 2, "a loss needs a step before it and one after it"
    chance = random.Random(seed)  # noqa: S311 -- histories, not secrets
    room = range(1, max(2, steps * 3 // 4))
    at = sorted(chance.sample(room, min(len(room), chance.randint(1, 5))))
    events = [Event(None, chance.randint(1, slots))]
    for step in at:
        events.append(Event(chance.choices(WORDS, (3, 1, 1, 1))[0], step))
        if chance.random() < 0.6:  # more often than not the size changes, too
            events.append(Event(None, chance.randint(1, slots)))
    return History(tuple(events))


def _items(text: str) -> Iterator[tuple[int, str]]:
    """The items of a line, each with the column at which it begins, from 1."""
    column = 1
    for part in text.split(","):
        yield column + len(part) - len(part.lstrip()), part.strip()
        column += len(part) + 1


def _event(item: str) -> Event:
    found = ITEM.fullmatch(item)
    assert found, item
    word = next((word for word in WORDS if word == found["word"]), None)
    return Event(word, int(found["step"] if word else found["size"]))


def _problem(item: str, before: list[Event], *, slots: int, steps: int) -> str:
    """Say what is wrong with an item that follows `before`; empty if nothing is."""
    found = ITEM.fullmatch(item)
    if found is None or (found["word"] and found["word"] not in WORDS):
        return _unread(item)
    event = _event(item)
    last = max((earlier.number for earlier in before if earlier.word), default=0)
    if event.word is None and not 1 <= event.number <= slots:
        return f"{event} workers, expected 1 to {slots}: a worker needs a slot (data.slots)"
    if event.word and not before:
        return f"{event} comes first; expected the number of workers to begin with, such as 4"
    if event.word and not last < event.number < steps:
        return f"{event}, expected a step from {last + 1} to {steps - 1}: steps increase, and the run has {steps}"
    return ""


def _unread(item: str) -> str:
    word, at, _ = item.partition("@")
    if not item:
        return f"nothing stands here; expected {ALLOWED}"
    if word in WORDS:
        return f"{item!r} names no step; expected {word}@N, such as {word}@30"
    hint = nearest(word.lower(), WORDS) if at or not word.isdecimal() else ""
    return f"{item!r}: expected {ALLOWED}{hint}"

"""Histories: what is read, what is refused and why, and how one is carried out step by step."""

import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastrain.elastic.histories import History, parse_history, random_history
from elastrain.elastic.script import Member, Play, Resize, Seen, Strike
from elastrain.errors import SpecError

DEMO = "4, kill@30, 2, 3, drain@80, 1"


def parse(text: str, slots: int = 6, steps: int = 200) -> History:
    return parse_history(text, slots=slots, steps=steps)


def test_a_history_is_read_and_says_itself() -> None:
    history = parse(" 4,kill@30 , 2,3,drain@80, 1 ")
    assert str(history) == DEMO
    assert parse(str(history)) == history
    assert (history.first, history.most, history.hits_nodes) == (4, 4, True)
    assert history.sizes == (4, 4, 2, 3, 3, 1)
    assert not parse("2, kill@3, stop@4").hits_nodes


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("", 1, "nothing stands here; expected a number of workers, kill@N"),
        ("4,,2", 3, "nothing stands here"),
        ("4, kill@30,", 12, "nothing stands here"),
        ("kill@30", 1, "kill@30 comes first; expected the number of workers to begin with, such as 4"),
        ("4, kil@30", 4, "'kil@30': expected .*; did you mean 'kill'?"),
        ("4, KILL@30", 4, "did you mean 'kill'?"),
        ("4, kill", 4, "'kill' names no step; expected kill@N, such as kill@30"),
        ("4, kill@", 4, "names no step"),
        ("4, kill@-3", 4, "names no step"),
        ("4, four", 4, "'four': expected a number of workers"),
        ("4, 2.5", 4, "'2.5': expected a number of workers"),
        ("4, -1", 4, "'-1': expected a number of workers"),
        ("4, 0", 4, "0 workers, expected 1 to 6: a worker needs a slot"),
        ("7", 1, "7 workers, expected 1 to 6"),
        ("4, 99999999999999999999", 4, "expected a number of workers"),
        ("4, kill@0", 4, "kill@0, expected a step from 1 to 199"),
        ("4, kill@200", 4, "kill@200, expected a step from 1 to 199: steps increase, and the run has 200"),
        ("4, kill@30, 2, stop@30", 16, "stop@30, expected a step from 31 to 199"),
    ],
)
def test_what_is_wrong_is_said_with_its_column(text: str, column: int, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert str(caught.value).startswith(f'history "{text}", column {column}: ')
    assert re.search(said, str(caught.value)), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_that_no_step_is_left_for_are_refused() -> None:
    parse("4, kill@198, 2, 1")
    with pytest.raises(SpecError, match="each number needs a step of its own"):
        parse("4, kill@198, 2, 1, 2")


def test_what_hits_the_only_worker_is_remarked() -> None:
    assert parse(DEMO).remarks() == []
    lost, drained = parse("1, kill@10, 2, kill@20, 1, drain@30").remarks()
    assert "kill@10 hits the only worker: the next one goes on from the last checkpoint" in lost
    assert "drain@30 hits the only worker: it hands its state to the next one" in drained


@given(seed=st.integers(0, 2**64), slots=st.integers(1, 16), steps=st.integers(2, 5000))
def test_random_histories_are_valid(seed: int, slots: int, steps: int) -> None:
    history = random_history(seed, slots=slots, steps=steps)
    assert parse(str(history), slots, steps) == history
    assert history == random_history(seed, slots=slots, steps=steps)


def test_random_histories_have_events_of_all_kinds() -> None:
    kinds = Counter(e.word for seed in range(100) for e in random_history(seed, slots=6, steps=200).events)
    assert set(kinds) == {None, "kill", "stop", "drain", "node"}


class Run:
    """A run as the script sees it: a roster without its difficulties; workers take `start` polls to come up."""

    def __init__(self, history: History, steps: int, *, start: int, pace: int, checkpoint: int = 50) -> None:
        self.play, self.steps, self.start, self.pace = Play(history, steps), steps, start, pace
        self.every = checkpoint
        self.step, self.count, self.now, self.idle = 0, 0, 0.0, 0
        self.minimum, self.maximum = 1, history.first
        self.members: list[Member] = []
        self.coming: list[int] = [0] * history.most  # polls until they stand by
        self.initial: int | None = history.first
        self.ranks: list[int] = []
        self.paused = 0

    def form(self) -> None:
        """Members at a boundary: surplus ones leave, those who stand by come."""
        self.coming += [self.start] * len(self.members[self.maximum :])
        del self.members[self.maximum :]
        while len(self.members) < self.maximum and 0 in self.coming:
            self.coming.remove(0)
            self.members.append(Member(name=f"w{self.count}", node=f"n{self.count}", pid=1000 + self.count))
            self.count += 1

    def poll(self) -> None:
        """Let the script act, then train on."""
        self.now += 0.2
        self.coming = [max(0, left - 1) for left in self.coming]
        for command in self.play.next(Seen(step=self.step, members=tuple(self.members)), self.now):
            if isinstance(command, Resize):
                assert 1 <= command.minimum <= command.maximum
                self.minimum, self.maximum = command.minimum, command.maximum
            else:
                self.ranks.append(self.members.index(command.member))
                self.members.remove(command.member)
                self.coming.append(self.start)
                if not self.members and command.word != "drain":
                    self.step -= self.step % self.every
        self.form()
        enough = self.initial or self.minimum
        if len(self.members) >= enough:
            self.initial = None
            self.step = min(self.steps, self.step + self.pace)
        else:
            self.paused += 1

    def finish(self) -> None:
        """Poll until the last step."""
        polls = 0
        while self.step < self.steps:
            self.poll()
            polls += 1
            assert polls < 100_000, "it stands still for ever"


def test_the_demonstration_is_carried_out_in_order() -> None:
    run = Run(parse(DEMO), 200, start=20, pace=2)
    run.finish()
    assert run.play.left == ()
    assert [act.event for act in run.play.acts] == list(parse(DEMO).events)
    first, kill, two, three, drain, one = run.play.acts
    assert first.step == 0
    assert kill.step in (30, 31)
    assert (len(kill.before), kill.survivors, kill.kept) == (4, 3, 3)
    assert (len(two.after), two.survivors, two.kept) == (2, 2, 2)
    assert (len(three.after), three.survivors, three.kept) == (3, 2, 2)
    assert drain.step in (80, 81)
    assert (len(one.after), one.survivors, one.kept) == (1, 1, 1)
    assert all(act.done is not None and act.done > act.at for act in run.play.acts)
    assert all(act.lowest == act.step for act in run.play.acts), "nobody went back"


def test_a_number_pauses_nobody_unless_it_gets_late() -> None:
    soon = Run(parse("2, 1, 2, kill@190"), 200, start=20, pace=2)
    soon.finish()
    assert soon.paused == 0
    late = Run(parse("2, 1, 2, kill@190"), 200, start=200, pace=2)
    late.finish()
    assert late.paused > 0
    assert late.play.acts[-1].step in (190, 191), "and the loss comes when it should"
    assert late.minimum == 1, "a loss shall not make those who are left stand still"


def test_a_lost_only_worker_goes_back_and_is_seen_to() -> None:
    run = Run(parse("1, kill@80"), 200, start=20, pace=1, checkpoint=50)
    run.finish()
    (act,) = run.play.acts[1:]
    assert (act.step, act.lowest, act.survivors) == (80, 50, 0)
    assert act.done is not None


def test_an_event_waits_for_its_turn() -> None:
    """The number before it is not there yet: workers need all of the run to come up."""
    play = Play(parse("1, 2, kill@10"), 200)
    member = Member(name="a", node="n", pid=1)
    found = [play.next(Seen(step=step, members=[member]), float(step)) for step in range(30)]
    assert [command for commands in found for command in commands] == [Resize(1, 1), Resize(1, 2), Resize(2, 2)]
    assert [str(event) for event in play.left] == ["2", "kill@10"]
    both = [member, Member(name="b", node="m", pid=2)]
    assert play.next(Seen(step=30, members=both), 30.0) == []
    release, strike = play.next(Seen(step=31, members=both), 31.0)
    assert release == Resize(1, 2)
    assert isinstance(strike, Strike)
    assert not play.left


def test_a_loss_after_the_last_step_proves_nothing() -> None:
    play = Play(parse("2, kill@90"), 100)
    members = [Member(name=name, node="n", pid=pid) for pid, name in enumerate("ab")]
    for step in (0, 1, 2, 100):
        play.next(Seen(step=step, members=members), float(step))
    assert [str(act.event) for act in play.acts] == ["2", "kill@90"]
    assert [str(event) for event in play.left] == ["kill@90"]


def test_a_lost_node_takes_all_its_workers() -> None:
    play = Play(parse("3, node@5"), 200)
    members = [Member(name=name, node="n", pid=pid) for pid, name in enumerate("abc")]
    play.next(Seen(step=0, members=members), 0.0)
    for step in range(1, 6):
        play.next(Seen(step=step, members=members), float(step))
    assert play.acts[-1].victims == {"a", "b", "c"}
    assert play.acts[-1].survivors == 0


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 8),
    steps=st.integers(60, 400),
    start=st.integers(0, 60),
    pace=st.integers(1, 3),
)
def test_any_history_comes_to_its_end(seed: int, slots: int, steps: int, start: int, pace: int) -> None:
    history = random_history(seed, slots=slots, steps=steps)
    run = Run(history, steps, start=start, pace=pace)
    run.finish()
    acts = run.play.acts
    assert [act.event for act in acts] == list(history.events[: len(acts)])
    for act, following in pairwise(acts):
        assert act.done is not None, "the next one waited"
        assert act.done <= following.at
        if act.event.word is None:
            assert len(act.after) == act.event.number
    assert all(act.step >= act.event.number for act in acts if act.event.word)
    assert len(acts) + len(run.play.left) in (len(history.events), len(history.events) + 1)


def test_every_rank_is_hit_and_the_same_history_hits_the_same_ones() -> None:
    def ranks(seed: int) -> list[int]:
        run = Run(random_history(seed, slots=4, steps=400), 400, start=3, pace=1)
        run.finish()
        return run.ranks

    assert [ranks(seed) for seed in range(10)] == [ranks(seed) for seed in range(10)]
    hit = Counter(rank for seed in range(100) for rank in ranks(seed))
    assert set(hit) == {0, 1, 2, 3}
    assert hit[0] > 20

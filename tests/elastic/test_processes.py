"""Runs on bare processes that are killed, stopped, drained and joined: what comes out is what one worker computes.

`HISTORIES=180 pytest tests/elastic/test_processes.py -k random` plays more histories by chance, `FIRST_SEED=…` others;
the number in the name of a failing test is its seed.
"""

import os

import pytest
from tests.elastic.process_histories import History, Violation, alone, check, play, random_history, told
from tests.elastic.process_stage import Event

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]

HISTORIES = int(os.environ.get("HISTORIES", "8"))
FIRST_SEED = int(os.environ.get("FIRST_SEED", "0"))


@pytest.mark.parametrize(("kind", "size"), [("mlp", 5), ("cnn", 4), ("gpt", 3), ("gan", 6)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_any_number_of_workers_computes_the_same_bits(kind: str, size: int, precision: str) -> None:
    play(kind=kind, size=size, changes={"precision": precision, "data.slots": 7})


@pytest.mark.parametrize("who", ["lead", "other"])
@pytest.mark.parametrize("place", ["audited", "phase 0", "evaluation"])
def test_the_others_go_on_when_one_is_killed(place: str, who: str) -> None:
    history = play(Event(action="kill", step=5, place=place, who=who), kind="cnn")
    assert not history.seen["attempt"]
    assert [record["workers"] for record in told(history, "worker_lost")] == [2]


def test_two_die_at_once_and_are_replaced_by_new_processes() -> None:
    history = play(Event(action="kill_two", step=5, who="lead", newcomers=2), kind="gpt", size=4)
    assert not history.seen["attempt"]
    assert len([member for member in history.members if member.end == "finished"]) >= 2


def test_one_is_left_of_five() -> None:
    history = play(Event(action="kill_others", step=6, place="phase 0"), size=5)
    assert not history.seen["attempt"]


def test_a_step_goes_on_with_the_phase_that_was_in_flight() -> None:
    for who in ("lead", "other"):
        history = play(Event(action="kill", step=3, place="phase 1", who=who), kind="gan")
        assert not history.seen["attempt"]


def test_nobody_is_left_and_the_run_goes_on_from_storage() -> None:
    history = play(Event(action="kill_all", step=10), kind="cnn")
    assert history.seen["attempt"] == 1


def test_a_worker_without_a_sign_is_given_up() -> None:
    history = play(Event(action="stop", step=5, who="lead"))
    assert {record["why"] for record in told(history, "worker_lost")} >= {"its lease ran out"}


def test_the_only_worker_is_given_up_while_another_waits_and_the_run_begins_anew() -> None:
    history = play(Event(action="stop", step=15, place="evaluation", newcomers=1), size=1)
    assert history.seen["attempt"] == 1


def test_a_worker_that_wakes_after_its_lease_ends_itself() -> None:
    history = play(Event(action="wake", step=5, place="phase 0"), kind="gan")
    assert [member.end.partition(":")[0] for member in history.members if member.harm == "woken"] == ["dismissed"]


def test_a_worker_that_is_silent_for_less_than_its_lease_stays() -> None:
    history = play(Event(action="pause", step=5))
    assert history.seen["late"] or not told(history, "worker_lost")


def test_an_exception_ends_one_worker() -> None:
    history = play(Event(action="raise", step=6, place="phase 0", newcomers=1))
    assert not history.seen["attempt"]
    assert len(told(history, "exception")) == 1


def test_a_worker_that_never_comes_to_the_sum_ends_itself() -> None:
    history = play(Event(action="hang", step=6, place="phase 0", who="other"))
    assert not history.seen["attempt"]


@pytest.mark.parametrize("who", ["lead", "other"])
def test_a_drained_worker_leaves_at_a_boundary(who: str) -> None:
    history = play(Event(action="drain", step=5, who=who))
    assert [record["workers"] for record in told(history, "preemption")] == [2]
    assert not told(history, "worker_lost")


def test_all_are_drained_and_others_go_on_from_the_checkpoint_that_they_left() -> None:
    history = play(Event(action="drain_all", step=6), kind="gpt")
    assert not history.seen["attempt"]


def test_all_are_drained_at_the_end_and_the_last_checkpoint_keeps_its_metrics() -> None:
    history = play(Event(action="drain_all", step=14), kind="cnn")
    assert not history.seen["attempt"]


def test_a_run_grows_and_shrinks() -> None:
    grow, shrink = (
        Event(action="resize", step=3, newcomers=2, limits=(4, 4)),
        Event(action="resize", step=9, limits=(1, 2)),
    )
    history = play(grow, shrink, kind="gan", size=2, limits=(1, 2))
    assert [(record["before"], record["workers"]) for record in told(history, "resize")] == [(2, 4), (4, 2)]


@pytest.mark.parametrize("place", ["join", "broadcast"])
@pytest.mark.parametrize("who", ["lead", "newcomer"])
def test_a_worker_dies_while_another_joins(place: str, who: str) -> None:
    history = play(
        Event(action="grow", step=4, newcomers=1),
        Event(action="kill", step=4, place=place, who=who),
        kind="cnn",
        size=3,
    )
    assert not history.seen["attempt"]


def test_a_newcomer_dies_as_soon_as_it_has_asked_for_a_place() -> None:
    play(Event(action="kill_waiting", step=4, newcomers=1))


@pytest.mark.parametrize("place", ["join", "broadcast"])
def test_a_worker_that_dies_before_anybody_has_the_state_ends_nothing(place: str) -> None:
    history = play(Event(action="kill", place=place, who="other"), size=4)
    assert not history.seen["attempt"]


def test_who_comes_to_lead_commits_what_the_one_before_had_begun() -> None:
    history = play(Event(action="kill", step=8, place="commit"))
    steps = [record["step"] for record in told(history, "checkpoint")]
    assert 8 not in steps
    assert any(8 < step < 12 for step in steps)


SLOW = Event(action="slow", step=12, place="commit")


@pytest.mark.parametrize(
    "event",
    [
        Event(action="grow", step=12, newcomers=1),
        Event(action="drain", step=12, who="lead"),
        Event(action="resize", step=12, limits=(1, 1)),
        Event(action="kill", step=12, who="other"),
    ],
    ids=["grow", "drain", "shrink", "kill"],
)
def test_members_change_while_a_checkpoint_is_written(event: Event) -> None:
    """It counts, and nobody writes or removes the same at the same time."""
    history = play(SLOW, event, newest_first=True)
    assert not history.seen["attempt"]
    assert {4, 8, 12, 15} <= {record["step"] for record in told(history, "checkpoint")}


def test_a_newcomer_that_is_soon_alone_knows_the_metrics_of_the_steps_before_it() -> None:
    history = play(Event(action="grow", step=3, newcomers=1), Event(action="kill_two", step=7, who="lead"), size=2)
    assert not history.seen["attempt"]


def test_a_newcomer_that_waits_when_the_run_ends_is_sent_home() -> None:
    play(Event(action="grow", step=14, newcomers=1))


def test_a_run_that_was_stopped_goes_on_with_other_workers() -> None:
    history = play(Event(action="stop_run", step=6), kind="gan")
    assert history.seen["attempt"] == 1


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + HISTORIES))
def test_a_random_history_ends_in_the_same_bits(seed: int) -> None:
    history = random_history(seed)
    print(f"seed {seed}: {history.kind}, {history.size} workers, {history.changes}", *history.events, sep="\n")  # noqa: T201
    check(history.run(), alone(history.kind, history.changes))


# --- controls: what these tests must catch


def test_control_sums_in_the_order_of_the_workers_have_other_bits() -> None:
    changes = {"consistency": "sample"}
    with pytest.raises(Violation, match="weights_sha256"):
        play(size=3, changes=changes)


def test_control_a_feed_in_another_order_is_caught() -> None:
    with pytest.raises(Violation, match="weights_sha256"):
        check(History(variant="disorderly").run(), alone("mlp", {}))


def test_control_padding_is_caught() -> None:
    history = History(variant="padded").run()
    with pytest.raises(Violation):
        check(history, alone("mlp", {}))
    rows = [(epoch, row) for epoch, _, _, row in history.audit]
    assert len(rows) > len(set(rows)), "the audit says what was trained on, not what should have been"


def test_control_a_loop_that_skips_the_step_in_flight_is_caught() -> None:
    with pytest.raises(Violation):
        play(Event(action="kill", step=6, who="other"), variant="skipping")


def test_control_a_newcomer_that_keeps_its_own_weights_is_caught() -> None:
    with pytest.raises(Violation, match="weights_sha256"):
        play(Event(action="grow", step=4, newcomers=1), variant="careless")

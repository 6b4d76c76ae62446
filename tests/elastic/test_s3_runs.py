"""Data and runs on a real S3 server, by the command line: the same bits as on a local folder, whatever is killed."""

import contextlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.elastic.test_run import BITWISE, SPEC, losses, result, wait_for
from tests.fault_proxy import Proxy, proxying
from tests.s3_server import SECRET_KEY
from tests.test_uploads import abandon

from elastrain import storage
from elastrain.observe.actions import read_actions
from elastrain.training.manifests import newest_whole, revoke
from elastrain.uploads import unfinished

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

FAULTS = ("503", "500", "reset", "truncate", "lost")
TWO = (*BITWISE, "--set", "workers={min: 2, max: 2}", "--set", "audit=true", "--set", "budget={epochs: 20}")


def files_of(url: str) -> dict[str, bytes]:
    """The files of a dataset, without the mark that their names have on S3 of who wrote them."""
    files = [file.path for file in storage.list_files(url)]
    return {re.sub(r"-[0-9a-f]{8}(?=\.parquet)", "", path): storage.read_bytes(f"{url}/{path}") for path in files}


@contextlib.contextmanager
def disturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, int]]]:
    """Have a fifth of all requests fail, each half second in another way; yield what counts them by kind."""
    ended = threading.Event()

    told = threading.Lock()  # one asks the proxy at a time

    def disturb(proxy: Proxy) -> None:
        for number, kind in enumerate(itertools.cycle(FAULTS)):
            with told:
                proxy.fault(kind, share=0.2, seed=number)
            if ended.wait(0.5):
                return

    with proxying(dict(os.environ)) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.environment["AWS_ENDPOINT_URL"])
        thread = threading.Thread(target=disturb, args=(proxy,))
        thread.start()

        def counts() -> dict[str, int]:
            with told:
                found = proxy.counts()
            return {kind: found.get(kind, 0) for kind in FAULTS}

        try:
            yield counts
        finally:
            ended.set()
            thread.join()


def test_a_run_on_s3_that_is_killed_goes_on_to_the_bits_of_one_on_a_local_folder(
    cli: Callable[..., Any],
    start: Callable[..., Any],
    workspace: Path,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the network fails it in all ways, again and again."""
    packed = cli("pack", "digits", f"{s3_bucket}/digits", "--json")
    assert result(packed)["splits"]["train"]["rows"] == 1442
    assert files_of(f"{s3_bucket}/digits") == files_of(str(workspace / "data" / "digits"))

    places = [f"data.train={s3_bucket}/digits/train", f"data.eval={s3_bucket}/digits/test", f"storage={s3_bucket}/runs"]
    there = [word for place in (*places, "name=killed") for word in ("--set", place)]
    run = f"{s3_bucket}/runs/killed"
    process = start("train", SPEC, *TWO, *there)
    wait_for(lambda: storage.exists(f"{run}/checkpoints/step-00000100/manifest.json") or process.poll() is not None)
    process.kill()
    out, said = process.communicate()
    assert not out, "it had to be killed before its end"
    abandon(f"{run}/checkpoints/step-00000999/model.safetensors", f"{run}/audit/00000999.parquet")
    with disturbed(monkeypatch) as hit:
        went_on = result(cli("train", SPEC, *TWO, *there))
        counts = hit()
    assert min(counts.values()) > 0, counts
    assert went_on["resumed_from"] >= 100, said
    assert (went_on["step"], went_on["workers"]) == (460, 2)

    again = result(cli("train", SPEC, *TWO, *there))
    assert unfinished(run) == [], "what killed writers were sending is ended, by the next one where requests fail"
    assert (again["resumed_from"], again["weights_sha256"]) == (460, went_on["weights_sha256"])

    told = [(each["action"], each["attempt"]) for each in read_actions(f"{s3_bucket}/runs") if each["run"] == run]
    assert told == [("start", 0), ("resume", 1)], "who has nothing to do is not noted"

    local = result(cli("train", SPEC, *TWO, "--set", "name=beside-s3", "--set", "workers={min: 1, max: 1}"))
    assert local["weights_sha256"] == went_on["weights_sha256"]
    assert files_of(f"{run}/audit") == files_of(f"{local['run']}/audit")
    assert losses(run).tolist() == losses(local["run"]).tolist()

    page = cli("report", run)
    assert page.returncode == 0, page.stderr
    assert f"page: {run}/report.html" in page.stdout
    told = json.loads(cli("report", run, "--json").stdout)
    assert told["run"] == run
    everything = said + page.stdout + json.dumps(told) + str(files_of(run))
    assert SECRET_KEY not in everything


def test_a_run_that_another_one_holds_is_refused_and_one_that_is_taken_over_stops(
    cli: Callable[..., Any], start: Callable[..., Any], s3_bucket: str
) -> None:
    held = ("--set", f"storage={s3_bucket}/runs", "--set", "name=held")
    run = f"{s3_bucket}/runs/held"
    process = start("train", SPEC, *TWO, *held, "--set", "budget={epochs: 2000}", "--set", "checkpoint.every_steps=20")
    wait_for(lambda: newest_whole(run, warn=lambda _: None) is not None or process.poll() is not None)
    refused = cli("train", SPEC, *TWO, *held)
    assert refused.returncode == 3, refused.stderr
    words = refused.stderr.splitlines()[-1]
    assert words.startswith(f"elastrain: error: {run}: in use by process {process.pid} of ")
    assert "wait for it, stop it, or give this run another name; if it is dead, the same command takes over" in words

    storage.put_json(f"{run}/.lock", {"token": "another", "pid": 7, "user": "who", "host": "came", "counter": 99})
    revoke(run)
    newest = newest_whole(run, warn=lambda _: None)
    out, said = process.communicate(timeout=120)
    assert (process.returncode, out) == (3, ""), said
    words = said.splitlines()[-1]
    assert words.startswith(f"elastrain: error: {run}: was taken over by process 7 of who on came while this process")
    assert newest_whole(run, warn=lambda _: None) == newest
    assert storage.read_json(f"{run}/.lock")["counter"] == 99, "who was taken over leaves the lock alone"


def test_what_cannot_work_is_one_sentence_and_exit_code_five(
    cli: Callable[..., Any], s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = cli("report", "s3://key:hidden@bucket/runs/x")
    assert (told.returncode, told.stdout) == (5, "")
    assert told.stderr.startswith("elastrain: error: s3://***@bucket/runs/x")
    assert ": a URL is no place for credentials" in told.stderr
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-and-wrong")
    told = (
        cli("report", f"{s3_bucket}/runs/x"),
        cli("train", SPEC, "--set", f"data.train={s3_bucket}/digits/train"),
        cli("train", SPEC, "--set", f"storage={s3_bucket}/runs"),
        cli("pack", "digits", f"{s3_bucket}/elsewhere"),
    )
    for done in told:
        assert done.returncode == 5, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("elastrain: error: cannot ")
        assert "AWS_SECRET_ACCESS_KEY" in line
        assert "hidden" not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr

"""Where the figures of machine types come from, and that a table of a user's own comes first."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastrain.__main__ import app
from elastrain.cluster.document import read_cluster
from elastrain.cluster.node_types import CLOUDS, ESTIMATE, node_table
from elastrain.errors import SpecError
from elastrain.spec.cluster import ClusterSpec

CLUSTERS = Path(__file__).parents[2] / "clusters"
OWN = """
date: 2027-01-01
sources: {contract: {date: 2026-12-01, url: "https://example.com/contract"}}
aws:
  p5.48xlarge:
    {cpus: 192, memory_gib: 2048, accelerator: H100, count: 8, on_demand_per_h: 31.5, on_demand_from: SOURCE}
"""


def spec(**changes: str) -> ClusterSpec:
    return read_cluster(CLUSTERS / "aws.yaml").spec.model_copy(update=changes)


def test_every_figure_of_ours_names_its_source_with_a_date_or_says_that_it_is_an_estimate() -> None:
    table = node_table(spec())
    for cloud in CLOUDS[:3]:
        kinds = getattr(table, cloud)
        assert kinds
        for name, kind in kinds.items():
            for figure, source in (
                (kind.on_demand_per_h, kind.on_demand_from),
                (kind.spot_per_h, kind.spot_from),
                (kind.watts, kind.watts_from),
            ):
                assert figure is not None, name
                told = table.told(source) or ""
                assert told == ESTIMATE or re.fullmatch(r"\d{4}-\d\d-\d\d https://\S+", told), name
    assert {kind.on_demand_from for kind in table.aws.values()} == {"ec2"}


def test_a_table_of_ones_own_comes_first_with_its_sources(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN.replace("SOURCE", "contract"))
    table = node_table(spec(prices=str(tmp_path / "own.yaml")))
    assert table.date == "2027-01-01"
    found = table.aws["p5.48xlarge"]
    assert (found.price(spot=False), table.told(found.on_demand_from)) == (
        31.5,
        "2026-12-01 https://example.com/contract",
    )
    assert found.price(spot=True) is None
    assert table.told(table.aws["p4d.24xlarge"].on_demand_from)


def test_a_source_that_nobody_named_is_an_error_at_its_line(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN.replace("SOURCE", "contrat"))
    with pytest.raises(SpecError, match=r"own\.yaml:[67]:.*'contrat' is none of the sources.*did you mean 'contract'"):
        node_table(spec(prices=str(tmp_path / "own.yaml")))


def test_check_marks_estimates_and_tells_sources() -> None:
    check = ["cluster", "check", str(CLUSTERS / "aws.yaml")]
    text = CliRunner().invoke(app, check).stdout
    assert re.search(r"h100 .* 55\.04 USD/h, ~8,500 W each", text), text
    assert re.search(r"h100-spot .* ~26\.00 USD/h", text), text
    pools = {pool["name"]: pool for pool in json.loads(CliRunner().invoke(app, [*check, "--json"]).stdout)["pools"]}
    assert pools["h100"]["per_h_from"].startswith("2026-07-20 https://")
    assert (pools["h100-spot"]["per_h_from"], pools["a100"]["watts_from"][:10]) == (ESTIMATE, "2026-04-24")

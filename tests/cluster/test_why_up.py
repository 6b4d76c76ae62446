"""What `why-up` makes of what Ray tells; `tests/elastic/test_autoscaling.py` asks a real cluster."""

import time

import pytest
from tests.cluster.conftest import CLUSTERS

from elastrain.cluster.document import read_cluster
from elastrain.cluster.pins import Node, Pin, look
from elastrain.cluster.why_up import as_text, explain
from elastrain.errors import ResourceError, SpecError

SPEC = CLUSTERS / "local-autoscaling" / "cluster.yaml"


def node(name: str, pool: str, *, stored: int = 0, idle_s: float = 0.0) -> Node:
    total = {"GPU": 1.0, "object_store_memory": 100.0 * (1 << 20)}
    free = {**total, "object_store_memory": total["object_store_memory"] - stored}
    return Node(id=name, pool=pool, head=pool == "", idle_s=idle_s, free=free, total={} if pool == "" else total)


def pins_of(nodes: list[Node], *pins: Pin) -> dict[str, list[str]]:
    found = explain(nodes, pins, None)
    return {each["node"]: [f"{pin['kind']}: {pin['what']}" for pin in each["pins"]] for each in found["nodes"]}


def test_an_object_is_named_only_where_as_much_is_held() -> None:
    nodes = [node("full", "t4", stored=3 << 20), node("less", "t4", stored=1 << 20), node("empty", "t4")]
    found = pins_of(nodes, Pin(kind="object", what="00ff", size=2 << 20))
    assert found == {"full": ["object: 2.0 MiB, 00ff"], "less": [], "empty": []}


def test_a_request_is_met_by_as_many_nodes_as_it_takes() -> None:
    nodes = [node(name, "t4") for name in "abc"]
    found = pins_of(nodes, Pin(kind="request", what="2 x GPU 1", bundles=({"GPU": 1.0},) * 2))
    assert found == {"a": ["request: 2 x GPU 1"], "b": ["request: 2 x GPU 1"], "c": []}


def test_nodes_have_prices_where_a_spec_says_what_they_are_and_a_pool_may_keep_some() -> None:
    spec = read_cluster(SPEC, ["pools.1.min=1"]).spec
    found = explain([node("h", ""), node("s", "h100-spot", idle_s=4.2), node("o", "h100-od")], [], spec)
    assert [each["per_h"] for each in found["nodes"]] == pytest.approx([0.4, 55.0, 26.0], abs=0.1)
    assert found["per_h"] == pytest.approx(81.4, abs=0.1)
    text = as_text(found)
    assert "min: the pool keeps 1 up" in text
    assert "nothing keeps it; idle for 4 s" in text
    assert "all together 81.4" in text
    strange = explain([node("x", "elsewhere")], [], spec)
    assert strange["per_h"] is None
    assert "price unknown" in as_text(strange)


@pytest.mark.parametrize(
    ("address", "text"),
    [("127.0.0.1:1", "no Ray answers at 127.0.0.1:1"), ("http://localhost:8265", "expected HOST:PORT of the head")],
)
def test_an_address_where_no_ray_is_is_told_at_once(address: str, text: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ResourceError, match=text):
        look(address)
    assert time.monotonic() - begun < 30


def test_only_a_local_cluster_is_held_and_only_its_pools_can_lack_capacity() -> None:
    from elastrain.elastic.local_autoscaling import hold, start_autoscaling

    with (
        pytest.raises(SpecError, match="aws is a cluster of aws; render it"),
        start_autoscaling(read_cluster(CLUSTERS / "aws.yaml").spec),
    ):
        pass
    with pytest.raises(SpecError, match="--no-capacity h200: local-autoscaling has h100-od, h100-spot, t4"):
        hold(read_cluster(SPEC).spec, ["h200"], show=lambda _: None)

"""What `why-up` makes of what Ray tells; `tests/elastic/test_autoscaling.py` asks a real cluster."""

import time
from dataclasses import replace
from typing import Any

import pytest
from tests.cluster.conftest import CLUSTERS

from elastrain.cluster.document import read_cluster
from elastrain.cluster.pins import Bundle, Node, Pin, Where, _pending, _requests, look
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
    found = pins_of(nodes, Pin(kind="request", what="2 x GPU 1", bundles=(Bundle({"GPU": 1.0}),) * 2))
    assert found == {"a": ["request: 2 x GPU 1"], "b": ["request: 2 x GPU 1"], "c": []}


WITH_H100 = (Where("ray.io/accelerator-type", among=True, values=frozenset({"H100"})),)
WITHOUT_SPOT = (Where("ray.io/node-group", among=False, values=frozenset({"spot"})),)


def test_what_waits_for_room_keeps_a_free_node_and_a_group_only_with_all_of_its_bundles() -> None:
    nodes = [replace(node("full", "t4"), free={}), node("a", "t4"), node("b", "t4")]
    one = Pin(kind="pending", what="tasks or actors, 1 x GPU 1", bundles=(Bundle({"GPU": 1.0}),))
    assert pins_of(nodes, one) == {"full": [], "a": [f"pending: {one.what}"], "b": []}
    apart = Bundle({"GPU": 1.0}, apart=True)
    two, three = (Pin(kind="pending", what=f"{n} apart", bundles=(apart,) * n, whole=True) for n in (2, 3))
    assert pins_of(nodes, two) == {"full": [], "a": ["pending: 2 apart"], "b": ["pending: 2 apart"]}
    assert pins_of(nodes, three) == {"full": [], "a": [], "b": []}


@pytest.mark.parametrize(
    ("where", "order", "kept"),
    [(WITH_H100, ["t4", "h100", "spot"], "h100"), (WITHOUT_SPOT, ["spot", "t4", "h100"], "t4")],
)
@pytest.mark.parametrize("kind", ["request", "pending"])
def test_a_request_keeps_only_nodes_with_the_labels_that_it_selects(
    kind: str, where: tuple[Where, ...], order: list[str], kept: str
) -> None:
    labels = {"spot": "H100", "t4": "T4", "h100": "H100"}
    nodes = [
        replace(node(name, name), labels={"ray.io/node-group": name, "ray.io/accelerator-type": labels[name]})
        for name in order
    ]
    pin = Pin(kind=kind, what="one", bundles=(Bundle({"GPU": 1.0}, where=(where,)),))
    assert [name for name, pins in pins_of(nodes, pin).items() if pins] == [kept]


def test_work_without_gpus_is_told_of_a_node_without_them_first() -> None:
    nodes = [node("gpu", "t4"), Node(id="cpu", pool="c", head=False, idle_s=0, free={"CPU": 4.0}, total={"CPU": 4.0})]
    nodes[0].free["CPU"] = nodes[0].total["CPU"] = 4.0
    pin = Pin(kind="pending", what="tasks", bundles=(Bundle({"CPU": 1.0}),))
    assert pins_of(nodes, pin) == {"gpu": [], "cpu": ["pending: tasks"]}


def test_what_the_head_says_of_requests_and_of_what_waits_is_read() -> None:
    from ray.core.generated import autoscaler_pb2

    message: Any = autoscaler_pb2.ClusterResourceState  # type: ignore[attr-defined] # made at import by protobuf
    state = message()
    asked = state.cluster_resource_constraints.add().resource_requests.add(count=2)
    asked.request.resources_bundle["GPU"] = 1.0
    task = state.pending_resource_requests.add(count=3)
    task.request.resources_bundle["CPU"] = 2.0
    selector = task.request.label_selectors.add()
    selector.label_constraints.add(label_key="ray.io/node-group", operator=2, label_values=["spot"])
    gang = state.pending_gang_resource_requests.add(details="0123456789abcdef:STRICT_PACK|PENDING")
    for _ in range(2):
        bundle = gang.bundle_selectors.add() if not gang.bundle_selectors else gang.bundle_selectors[0]
        request = bundle.resource_requests.add()
        request.resources_bundle["GPU"] = 1.0
        request.placement_constraints.add().affinity.label_name = "group"
    spread = state.pending_gang_resource_requests.add(details="fedcba9876543210:STRICT_SPREAD|PENDING")
    for _ in range(2):
        request = spread.requests.add()
        request.resources_bundle["GPU"] = 1.0
        request.placement_constraints.add().anti_affinity.label_name = "group"
    wanted, tasks, packed, apart = [*_requests(state), *_pending(state)]
    assert (wanted.kind, wanted.what, len(wanted.bundles)) == ("request", "2 x GPU 1", 2)
    assert tasks.what == "tasks or actors, 3 x CPU 2"
    assert tasks.bundles == (Bundle({"CPU": 2.0}, where=(WITHOUT_SPOT,)),) * 3
    assert (packed.what, packed.bundles) == ("placement group 0123456789ab, 1 x GPU 2", (Bundle({"GPU": 2.0}),))
    assert apart.bundles == (Bundle({"GPU": 1.0}, apart=True),) * 2
    assert (apart.what, apart.whole, tasks.whole) == ("placement group fedcba987654, 2 x GPU 1", True, False)


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

"""What the project stands on inside Ray, checked against the Ray that is installed: what fails here is broken there.

Nothing is started. Each message says what has changed and what of ours depends on it.
"""

import ast
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

PACKAGE = Path(__file__).parents[2] / "platform" / "elastrain"


def takes(function: Callable[..., Any], *names: str) -> bool:
    """Whether these are parameters, or it takes any."""
    parameters = inspect.signature(function).parameters
    return set(names) <= set(parameters) or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def says(thing: Any, *texts: str) -> bool:
    """Whether these stand in its source, however it is wrapped and indented."""
    source = "".join(inspect.getsource(thing).split())
    return all("".join(text.split()) in source for text in texts)


# --- where we reach in


def test_two_modules_reach_into_ray_and_a_few_others_for_what_is_named_here() -> None:
    inner = ("ray._private", "ray._raylet", "ray.core", "ray.train.v2", "ray.data._internal", "ray.data.block")
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            else:
                continue
            reached = {name for name in names if name.startswith(inner)}
            if reached:
                found.setdefault(str(file.relative_to(PACKAGE)), set()).update(reached)
    assert found.pop("elastic/ray_inner.py", None), "elastic/ray_inner.py is where Ray's inner interfaces belong"
    assert found.pop("elastic/trainer.py", None), "elastic/trainer.py is where Ray Train's inner interfaces belong"
    below = {  # where elastic cannot be imported from
        "cluster/job_server.py": {"ray._private.authentication"},
        "cluster/pins.py": {
            *("ray._private.authentication", "ray._private.services", "ray._raylet", "ray.core.generated")
        },
        "cluster/preemption.py": {"ray._private.authentication", "ray._raylet", "ray.core.generated"},
        "cluster/scheduling.py": {"ray.core.generated"},
        "cluster/security.py": {"ray._private.authentication", "ray._private.services", "ray._raylet"},
        "elastic/fake_nodes.py": {"ray._private", "ray._private.parameter"},  # in the autoscaler
        "data/pipeline.py": {"ray.data.block"},
        "data/no_demand.py": {"ray.data._internal.cluster_autoscaler", "ray.data._internal.execution"},
        "data/pack.py": {"ray._private.utils"},
    }
    assert found == below, (
        "another module reaches into Ray: move that to elastic/ray_inner.py, or to elastic/trainer.py for Ray Train"
    )


def test_tune_still_takes_the_names_of_what_it_gives_to_trials_from_where_sweeps_take_the_keys_out() -> None:
    from ray.tune.execution import class_cache

    said = "sweeps/tuning.py takes AWS's keys out of Tune's ENV_VARS_TO_PROPAGATE, else Ray's logs show them"
    assert isinstance(class_cache.ENV_VARS_TO_PROPAGATE, set), said
    assert says(class_cache._ActorClassCache.get, "ENV_VARS_TO_PROPAGATE"), said


# --- the cluster: ray_inner.py


def test_the_global_state_tells_what_is_free_what_drains_and_what_an_autoscaler_may_add() -> None:
    from ray._private import state

    for name in ("available_resources_per_node", "get_draining_nodes", "get_cluster_config"):
        assert hasattr(state.GlobalState, name), f"GlobalState.{name} is gone: see ray_inner, session.room, fleet"
    assert hasattr(state, "available_resources_per_node"), "state.available_resources_per_node: session.room needs it"
    assert "deadline timestamps in ms" in str(state.GlobalState.get_draining_nodes.__doc__), (
        "deadlines of draining nodes may no longer be milliseconds: ray_inner.draining_nodes divides by 1000"
    )
    assert "no deadline if the timestamp is 0" in str(state.GlobalState.get_draining_nodes.__doc__), (
        "0 may no longer mean that a draining node has no deadline: ray_inner.draining_nodes"
    )


def test_a_cluster_config_has_node_groups_with_resources_and_a_count() -> None:
    from ray.core.generated import autoscaler_pb2

    message: Any = autoscaler_pb2
    assert "node_group_configs" in message.ClusterConfig.DESCRIPTOR.fields_by_name, (
        "ClusterConfig.node_group_configs is gone: ray_inner.node_types cannot see what an autoscaler may add"
    )
    fields = message.NodeGroupConfig.DESCRIPTOR.fields_by_name
    assert {"name", "resources", "max_count"} <= set(fields.keys()), (
        "NodeGroupConfig has other fields: ray_inner.node_types"
    )


def test_the_table_of_placement_groups_says_which_actor_asked_for_each() -> None:
    from ray._private.state import GlobalState
    from ray.core.generated import gcs_pb2

    message: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined] # made at import by protobuf
    fields = message.DESCRIPTOR.fields_by_name
    assert {"creator_actor_id", "creator_job_id", "placement_group_id", "state"} <= set(fields.keys()), (
        "PlacementGroupTableData has other fields: ray_inner.groups_of, so ended cells would hold their CPUs for ever"
    )
    assert hasattr(message, "REMOVED"), "PlacementGroupTableData.REMOVED is gone: ray_inner.groups_of"
    assert says(GlobalState.placement_group_table, "accessor.get_placement_group_table("), (
        "Ray reads the table of placement groups in another way: ray_inner.groups_of"
    )
    assert hasattr(GlobalState, "_connect_and_get_accessor"), "GlobalState has no accessor: ray_inner.groups_of"


def test_an_actor_handle_knows_its_id() -> None:
    from ray.actor import ActorHandle

    assert says(ActorHandle.__init__, "_ray_actor_id"), "ActorHandle has no id inside: ray_inner.actor_id"
    assert isinstance(inspect.getattr_static(ActorHandle, "_actor_id"), property), (
        "ActorHandle._actor_id is gone: ray_inner.actor_id, by which ended cells are freed"
    )


def test_every_node_carries_its_id_as_a_label() -> None:
    import ray

    from elastrain.elastic.ray_inner import NODE_ID_LABEL

    raylet: Any = ray._raylet
    assert raylet.RAY_NODE_ID_KEY == NODE_ID_LABEL, (
        f"nodes now carry their id as {raylet.RAY_NODE_ID_KEY}: ray_inner.NODE_ID_LABEL, or cells wait for ever"
    )


def test_the_status_of_a_cluster_tells_failed_launches_what_cannot_be_placed_and_who_is_managed() -> None:
    from ray.core.generated import autoscaler_pb2

    types: Any = autoscaler_pb2.DESCRIPTOR.message_types_by_name
    fields = {
        "GetClusterStatusReply": {"autoscaling_state", "cluster_resource_state"},
        "AutoscalingState": {
            *("autoscaler_state_version", "failed_instance_requests", "infeasible_gang_resource_requests")
        },
        "FailedInstanceRequest": {"ray_node_type_name", "failed_ts"},
        "GangResourceRequest": {"details"},
        "ClusterResourceState": {"node_states", "cluster_resource_constraints"},
        "NodeState": {"instance_id", "ray_node_type_name", "node_activity", "idle_duration_ms"},
    }
    for name, wanted in fields.items():
        assert wanted <= {field.name for field in types[name].fields}, f"{name} has other fields: ray_inner.autoscaler"


def test_a_slow_head_leaves_what_its_autoscaler_said_and_is_asked_again_where_nothing_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.core.generated import autoscaler_pb2
    from ray.exceptions import RpcError

    from elastrain.elastic import ray_inner
    from elastrain.errors import ResourceError

    message: Any = autoscaler_pb2.GetClusterStatusReply  # type: ignore[attr-defined] # made at import by protobuf
    reply = message()
    reply.autoscaling_state.autoscaler_state_version = 1
    reply.cluster_resource_state.node_states.add(instance_id="i-1")

    class Client:
        address = "a-slow-head:6379"
        answers: ClassVar[list[bytes]] = []

        def get_cluster_status(self, timeout_s: float) -> bytes:
            assert timeout_s
            if not self.answers:
                raise RpcError("Deadline Exceeded")
            return self.answers.pop(0)

    def asked() -> None:
        Client.answers.append(reply.SerializeToString())

    client = Client()
    monkeypatch.setattr("ray._private.worker.global_worker", SimpleNamespace(gcs_client=client))
    monkeypatch.setattr(ray_inner, "SLOW_S", 0.0)
    with pytest.raises(ResourceError, match="the head at a-slow-head:6379 does not say what its cluster holds"):
        ray_inner.autoscaler()
    monkeypatch.setattr(ray_inner, "SLOW_S", 60.0)
    monkeypatch.setattr("elastrain.elastic.ray_inner.time.sleep", lambda _: asked())
    said = ray_inner.autoscaler()
    assert said is not None
    assert ray_inner.autoscaler() is said, "a slow head takes nothing back"


def test_token_authentication_can_be_turned_on_by_a_client() -> None:
    from ray._private.authentication import authentication_token_setup as module

    assert takes(module.maybe_enable_token_auth_if_token_available, "warn_if_disabled"), (
        "maybe_enable_token_auth_if_token_available has changed: ray_inner.enable_token_auth, used by ray_session"
    )


def test_ray_can_start_without_an_autoscaler_and_a_reader_of_logs() -> None:
    from ray._private import node, worker
    from ray._private.parameter import RayParams

    assert takes(RayParams.__init__, "no_monitor", "include_log_monitor"), "RayParams has others: without_monitors"
    assert says(worker.init, "ray._private.parameter.RayParams("), "ray.init calls it otherwise: without_monitors"
    assert says(node.Node, "if not self._ray_params.no_monitor:", "if self._ray_params.include_log_monitor:"), (
        "a node does not ask for these any more: ray_inner.without_monitors"
    )
    assert says(node.Node, "self._webui_url, process_info = ray._private.services.start_api_server("), (
        "a node starts its server of APIs otherwise: ray_inner.without_monitors"
    )


def test_a_node_that_is_slow_to_start_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine: Ray itself gives up after half a minute."""
    from ray._private import node, services

    from elastrain.elastic import ray_inner

    assert says(node.Node, "ray._private.services.get_node("), "a node looks for itself otherwise: patient_start"
    answers = iter([RuntimeError("not yet"), RuntimeError("not yet"), {"node_id": "there"}])

    def slow(*_: object) -> object:
        found = next(answers)
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.setattr(services, "get_node", slow)
    with ray_inner.patient_start():
        assert services.get_node("gcs", "node") == {"node_id": "there"}
    assert services.get_node is slow


def test_a_raylet_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import node, services

    from elastrain.elastic import ray_inner

    assert says(node.Node, "ray._private.services.start_raylet("), "a node starts its raylet otherwise: patient_start"

    def never(*_: object) -> object:
        raise RuntimeError("no such node")

    ended = SimpleNamespace(process=SimpleNamespace(poll=lambda: 134))
    monkeypatch.setattr(services, "get_node", never)
    monkeypatch.setattr(services, "start_raylet", lambda *_: ended)
    begun = time.monotonic()
    with ray_inner.patient_start():
        start: Any = services.start_raylet
        assert start("redis") is ended
        with pytest.raises(RuntimeError, match="no such node"):
            services.get_node("gcs", "node")
    assert time.monotonic() - begun < ray_inner.NODE_S / 2


def test_the_agent_of_a_dashboard_is_started_by_a_command_that_is_made_by_a_name() -> None:
    from ray._private import services

    assert says(services.start_raylet, "ray_constants.PROCESS_TYPE_DASHBOARD_AGENT", '"--session-dir={session_dir}"'), (
        "a raylet's agent is started otherwise: ray_inner.patient_start, no_agent"
    )


# --- Ray Train: trainer.py


def test_a_trainer_hands_its_controller_a_failure_policy_and_our_callbacks() -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    assert says(DataParallelTrainer.fit, "self._initialize_and_run_controller(", "failure_policy="), (
        "fit() starts its controller differently: trainer.CellTrainer puts its policy in and runs it in process"
    )
    assert says(DataParallelTrainer.fit, "callbacks=self._create_default_callbacks()"), (
        "fit() makes its callbacks differently: trainer.CellTrainer leaves the placement group cleaner out"
    )
    assert says(DataParallelTrainer.__init__, "self.train_run_context = TrainRunContext("), (
        "the run's context is made elsewhere: trainer.CellTrainer names the run there"
    )


def test_a_controller_runs_in_process_and_names_the_class_of_its_worker_group() -> None:
    from ray.train.v2._internal.execution.controller import TrainController

    assert inspect.iscoroutinefunction(TrainController.run), "TrainController.run is no coroutine: trainer.CellTrainer"
    assert hasattr(TrainController, "get_result"), "TrainController.get_result is gone: trainer.CellTrainer"
    assert says(TrainController._start_worker_group, "self.worker_group_cls.create("), (
        "TrainController.worker_group_cls is not used: trainer.CellController would get Ray's own group, "
        "in which two deaths at once end a healthy worker"
    )


def test_a_scaling_policy_asks_rays_coordinator_in_two_places_only() -> None:
    from ray.train.v2._internal.execution import scaling_policy as module
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    assert says(DataParallelTrainer.fit, "scaling_policy=create_scaling_policy("), "fit() scales otherwise: CellTrainer"
    policy: Any = module.ScalingPolicy
    assert says(policy.after_controller_start, "self._coordinator_client =", "self._send_resource_request()"), (
        "a run registers with Ray's coordinator elsewhere: trainer.CellScaling keeps it from that"
    )
    assert says(policy._cancel_resource_request, "if self._coordinator_client is None: return"), (
        "a policy that never registered cannot end: trainer.CellScaling"
    )
    for name in ("make_decision_for_non_running_worker_group", "make_decision_for_running_worker_group"):
        assert says(getattr(module.FixedScalingPolicy, name), "self._maybe_send_resource_request()"), (
            "a fixed size asks Ray's coordinator by another method: trainer.CellScaling keeps it from that"
        )


def test_a_backend_with_replica_groups_has_only_its_failing_workers_replaced() -> None:
    from ray.train.backend import Backend
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    assert Backend.has_replica_groups is False, "Backend.has_replica_groups has changed: trainer.InPlace"
    assert says(
        TrainController._execute_resize_decision,
        "self._manages_replica_groups",
        "failing_rgs != all_rgs",
        "self._replace_bad_workers(poll_status)",
    ), "Ray replaces failing workers on other conditions: a death may restart the whole cell (trainer.InPlace)"
    assert says(TrainController._replace_bad_workers, "self._worker_group.replace_replica_group(rg_index)"), (
        "Ray replaces a worker by another method: trainer.CellGroup.replace_replica_group would not be called"
    )
    assert takes(WorkerGroup.replace_replica_group, "replica_group_index"), "trainer.CellGroup overrides another name"


def test_replacing_a_worker_calls_the_active_others_first() -> None:
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    assert hasattr(RayTrainWorker, "clear_result_queue"), "clear_result_queue is gone: trainer.CellGroup asks with it"
    assert says(WorkerGroup._replace_replica_group_impl, "i != replica_group_index and rg.is_active()"), (
        "Ray no longer passes over groups that are shut down: trainer.CellGroup takes the dead out so"
    )
    for name in ("get_latest_poll_status", "get_replica_groups"):
        assert hasattr(WorkerGroup, name), f"WorkerGroup.{name} is gone: trainer.CellGroup"


def test_a_replica_group_can_be_shut_down_by_itself() -> None:
    from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup

    for name in ("shutdown", "is_active", "get_workers"):
        assert hasattr(ReplicaGroup, name), f"ReplicaGroup.{name} is gone: trainer.CellGroup"
    assert says(ReplicaGroup.shutdown, "self._active = False"), "a group that is shut down stays active: CellGroup"


def test_a_worker_group_makes_an_actor_for_a_barrier_and_ends_it_by_names_of_its_modules() -> None:
    from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState, WorkerGroupStateBuilder
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    said = "trainer.NoBarrier stands in for it, which saves a process a cell"
    assert says(WorkerGroup._start_impl, "sync_actor = SynchronizationActor.options(", ").remote("), said
    assert says(WorkerGroup._replace_replica_group_impl, "ray.get(sync_actor.reset.remote())"), said
    for owner in (WorkerGroupState, WorkerGroupStateBuilder):
        assert says(owner.shutdown, "_shutdown_sync_actor(self.sync_actor)"), said
    for method in (WorkerGroup._start_impl, WorkerGroup._replace_replica_group_impl):
        assert says(method, "workers, sync_actor)"), "workers are told of it otherwise: trainer.CellGroup"
    assert takes(WorkerGroup._init_train_context, "workers", "sync_actor"), "trainer.CellGroup overrides another name"


def test_each_poll_makes_a_new_status_and_a_worker_is_its_own_replica_group() -> None:
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    assert says(WorkerGroup.poll_status, "self._latest_poll_status = worker_group_poll_status"), (
        "a look is kept differently: trainer.CellGroup knows by it which replacements are done"
    )
    assert says(WorkerGroup._start_impl, "replica_group_size=1 if self._manages_replica_groups else None"), (
        "replica groups may hold several workers: trainer.Patience counts one a failure"
    )


def test_a_failure_policy_makes_one_decision_a_failure() -> None:
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy

    assert takes(FailurePolicy.make_decision, "training_failed_error"), "FailurePolicy has changed: trainer.Patience"
    assert {"RETRY", "RAISE"} <= set(FailureDecision.__members__), "FailureDecision has changed: trainer.Patience"


def test_failures_say_which_workers_failed_or_what_the_controller_met() -> None:
    from ray.train.v2._internal import exceptions
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    assert takes(WorkerGroupError.__init__, "worker_failures"), "WorkerGroupError has changed: trainer.Patience"
    assert takes(ControllerError.__init__, "controller_failure"), "ControllerError has changed: trainer.Patience"
    for name in ("WorkerGroupStartupFailedError", "WorkerGroupStartupTimeoutError"):
        assert hasattr(exceptions, name), f"{name} is gone: trainer.Patience tells room from breakage by it"


def test_workers_are_placed_by_strategy_and_label() -> None:
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
    from ray.train.v2.api.config import ScalingConfig

    assert takes(ScalingConfig.__init__, "placement_strategy", "label_selector", "use_gpu", "resources_per_worker"), (
        "ScalingConfig has changed: trainer.on_one_node"
    )
    assert says(WorkerGroup._create_placement_group, "bundle_label_selector=worker_group_context.label_selector"), (
        "the label selector does not reach the placement group: cells would not stay on their node"
    )


@pytest.mark.parametrize(
    "name",
    [
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
    ],
)
def test_a_cells_settings_are_still_read(name: str) -> None:
    from ray.train.v2._internal import constants

    assert name in vars(constants).values(), f"Ray Train no longer reads {name}: cells.SETTINGS, cells.Cell.run"


def test_the_helpers_that_a_cell_does_without_are_still_callbacks_of_their_own() -> None:
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from elastrain.elastic.trainer import HELPERS

    for helper in HELPERS:
        assert says(DataParallelTrainer._create_default_callbacks, f"{helper.__name__}("), (
            f"{helper.__name__} is made elsewhere: trainer.CellTrainer leaves it out, it costs a process"
        )
    shards = inspect.signature(RayTrainWorker.init_train_context).parameters["dataset_shard_provider"]
    assert shards.default is None, "a worker cannot be without a provider of dataset shards: trainer.HELPERS"


# --- Ray Data: data/pipeline.py, data/no_demand.py and data/pack.py


def test_a_dataset_gives_out_its_bundles_and_a_block_its_metadata() -> None:
    from ray.data import Dataset
    from ray.data.block import BlockMetadata

    assert hasattr(Dataset, "iter_internal_ref_bundles"), "Dataset.iter_internal_ref_bundles is gone: data.pipeline"
    assert takes(BlockMetadata.__init__, "num_rows", "size_bytes", "input_files", "exec_stats"), (
        "BlockMetadata has other fields: data.pipeline makes them for its read tasks"
    )


def test_an_execution_makes_who_asks_for_nodes_by_a_name_of_its_module() -> None:
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    assert says(
        StreamingExecutor.execute,
        "create_cluster_autoscaler( self._topology, self._resource_manager, self._data_context, execution_id=",
    ), "executions ask for nodes otherwise: data.no_demand keeps ours from that"
    asked = {"try_trigger_scaling", "on_executor_shutdown", "get_total_resources"}
    assert ClusterAutoscaler.__abstractmethods__ == asked, "ClusterAutoscaler has changed: data.no_demand.AsItIs"


def test_an_execution_tells_its_numbers_by_two_methods_of_a_name_of_its_module() -> None:
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.stats import _StatsManager

    source = inspect.getsource(streaming_executor)
    said = "data.no_demand keeps ours from starting a process that keeps them for Ray's dashboard"
    for name in ("register_dataset_to_stats_actor", "update_execution_metrics"):
        assert source.count(f"_StatsManager.{name}(") == 1, said
    assert source.count("_StatsManager.") == 2, f"an execution tells something else: {said}"
    assert takes(_StatsManager.register_dataset_to_stats_actor, "data_context"), said
    assert says(streaming_executor.StreamingExecutor, "register_dataset_to_stats_actor( self._dataset_id,"), said
    assert says(streaming_executor.StreamingExecutor, "update_execution_metrics( self._dataset_id,"), said


def test_ray_counts_the_cpus_of_this_machine() -> None:
    from ray._private import utils

    assert callable(utils.get_num_cpus), "ray._private.utils.get_num_cpus is gone: data.pack.machine_cpus"

"""Every message survives the wire: values of each noun and each RPC, drawn by Hypothesis, walk both ways."""

import dataclasses
import enum
import types
import typing
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm.core.priority import Priority
from sllm.core.replica import ReplicaState, StartPhase
from sllm.errors import InvalidArgument
from sllm.rpc import agent_pb2, agents, common_pb2, control, engine, engine_pb2, nodes, routes
from sllm.rpc.convert import from_proto, to_proto
from sllm.rpc.transport import Method

METHODS: list[Method[Any, Any]] = [
    *control.METHODS,
    nodes.REGISTER,
    nodes.HEARTBEAT,
    routes.WATCH_ROUTES,
    routes.ACQUIRE,
    routes.REPORT_LOAD,
    *agents.METHODS,
    engine.ATTACH,
    engine.STOP,
    engine.MIGRATE,
    engine.RECOMPUTE,
]
MESSAGES = {m.request: m.request_message for m in METHODS} | {m.response: m.response_message for m in METHODS}

# Names have grammars that are checked when a spec is made.
NAMES = {"DeploymentName", "CheckpointName", "NodeName"}


def strategy_for(hint: Any) -> st.SearchStrategy[Any]:
    if getattr(hint, "__name__", "") in NAMES:
        return st.sampled_from(["a", "llama-3", "x.y_z"])
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return st.lists(strategy_for(args[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), strategy_for(args[1]), max_size=2)
    if origin in (types.UnionType, typing.Union):
        return st.none() | strategy_for(next(a for a in args if a is not type(None)))
    return plain_strategy_for(hint)


def plain_strategy_for(hint: Any) -> st.SearchStrategy[Any]:
    if dataclasses.is_dataclass(hint):
        return value_of(hint)
    if issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    by_type: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 2**40),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
    }
    return by_type[hint]


def value_of(cls: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: strategy_for(hints[f.name]) for f in dataclasses.fields(cls)}
    if cls.__name__ == "DeploymentSpec":
        fields |= {"min_replicas": st.just(0), "max_replicas": st.just(3), "engine_args": st.just({"dtype": "auto"})}
        fields |= {"devices": st.just(1), "target_concurrency": st.just(4), "keep_alive_s": st.just(1.5)}
        fields |= {"max_model_len": st.none() | st.just(7)}
    if cls.__name__ == "RecomputeRequest":
        fields |= {"token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=2).map(tuple)}
    return st.builds(cls, **fields)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_dataclass_and_message_have_the_same_fields(cls: Any) -> None:
    assert {f.name for f in dataclasses.fields(cls)} == set(MESSAGES[cls].DESCRIPTOR.fields_by_name)


@settings(deadline=None)  # a class's first value makes its strategies
@given(st.data())
def test_every_message_survives_the_wire(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(list(MESSAGES)))
    value = data.draw(value_of(cls))
    message_type: type[Message] = MESSAGES[cls]
    wire = to_proto(value, message_type).SerializeToString()
    assert from_proto(message_type.FromString(wire), cls) == value


def test_an_enum_value_of_a_newer_peer_is_a_clear_error() -> None:
    message = engine_pb2.HostStatus(replica="rep-1", state=77, phase=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="ReplicaState 77"):
        from_proto(message, engine.HostStatus)


@pytest.mark.parametrize(("number", "priority"), [(0, Priority.REQUEST), (1, Priority.PREWARM), (77, Priority.REQUEST)])
def test_a_start_without_a_known_priority_is_as_urgent_as_a_request(number: int, priority: Priority) -> None:
    message = agent_pb2.StartReplicaRequest(epoch=1, spec=common_pb2.ReplicaSpec(id="rep-1"))
    message.priority = number  # type: ignore[assignment]
    assert from_proto(message, agents.StartReplicaCommand).priority is priority


def test_an_enum_that_was_never_set_is_a_clear_error() -> None:
    with pytest.raises(InvalidArgument, match="ReplicaState UNSPECIFIED"):
        from_proto(engine_pb2.HostStatus(replica="rep-1"), engine.HostStatus)


def test_a_value_that_its_class_refuses_is_the_peers_fault() -> None:
    with pytest.raises(InvalidArgument):
        from_proto(common_pb2.DeploymentSpec(name="a b", checkpoint="c"), control.DeploymentSpec)


def test_enum_names_are_those_of_the_proto() -> None:
    wire = to_proto(
        engine.HostStatus(replica="rep-1", state=ReplicaState.READY, phase=StartPhase.BUILDING),  # type: ignore[arg-type]
        engine_pb2.HostStatus,
    )
    assert wire == engine_pb2.HostStatus(
        replica="rep-1", state=common_pb2.REPLICA_STATE_READY, phase=common_pb2.START_PHASE_BUILDING
    )

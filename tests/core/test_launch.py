"""Launch values survive their JSON."""

from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, ReplicaId
from sllm.core.launch import Launch, LaunchRecord, TensorEntry
from sllm.core.replica import ReplicaSpec

SPEC = ReplicaSpec(
    id=ReplicaId("rep-1"),
    deployment=DeploymentName("chat"),
    revision=1,
    generation=7,
    checkpoint=CheckpointName("demo"),
    digest="sha256:0",
    devices=(DeviceId("cpu-0"),),
    capacity=32,
    max_model_len=1024,
    engine_args={"dtype": "float32"},
)


def test_a_launch_survives_its_json() -> None:
    launch = Launch(
        spec=SPEC,
        nonce="n",
        tensors=(TensorEntry(name="w", offset=64, size_bytes=8, dtype="float32", shape=(2,)),),
        execution_dir="/x",
        record_path="/y",
        scratch_dir="/z",
        bind_host="127.0.0.1",
        device_kind="cpu",
        device_ids=(DeviceId("cpu-0"),),
        threads=1,
        memory_bytes=1,
        kv_cache_bytes=2,
        grace_s=3.0,
    )
    assert Launch.from_json(launch.to_json()) == launch


def test_a_record_survives_its_json() -> None:
    record = LaunchRecord(replica=SPEC.id, nonce="n", pid=1, start_ticks=2, address="127.0.0.1:1", spec=SPEC)
    assert LaunchRecord.from_json(record.to_json()) == record

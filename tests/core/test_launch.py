"""Launch values survive their JSON."""

from sllm.core.grant import POOL_BLOCK_BYTES, Extent, Grant
from sllm.core.ids import CheckpointName, DeploymentName, DeviceId, ReplicaId
from sllm.core.launch import Launch, LaunchRecord
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
        grant=Grant(
            digest="sha256:1",
            partition=0,
            generation=3,
            size_bytes=10,
            chunk_bytes=4096,
            extents=(Extent(POOL_BLOCK_BYTES, POOL_BLOCK_BYTES), Extent(0, POOL_BLOCK_BYTES)),
            slots=1,
            ready_chunks=0,
        ),
        weights_dir="/w",
        save_runtime="/r",
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

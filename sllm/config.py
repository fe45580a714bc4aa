"""The one configuration loader: TOML file -> checked values. An unknown key is an error that names its place.

One model per process (`ControllerConfig`, `GatewayConfig`, `AgentConfig`). Relative paths are relative to the
process' working directory. Secrets are never values here: keys are paths to files.
"""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sllm.core.ids import node_name
from sllm.errors import InvalidConfiguration, SllmError

_GIB = 1 << 30


class Section(BaseModel):
    """A table of a TOML file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("write HOST:PORT")
    return value


def _checked_node_name(value: str) -> str:
    try:
        return node_name(value)
    except SllmError as error:
        raise ValueError(error.message) from error


Address = Annotated[str, AfterValidator(_checked_address)]


class TlsConfig(Section):
    """Paths of PEM files. Leaving the section out means no TLS, which is for loopback only."""

    ca: Path
    certificate: Path
    key: Path


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    json_lines: bool = Field(default=False, alias="json")


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _needs_tls(tls: TlsConfig | None, addresses: dict[str, str]) -> None:
    """Nothing crosses a network in the clear."""
    for key, address in addresses.items():
        if tls is None and not _is_loopback(address):
            raise ValueError(f"{key} = {address!r} is not on loopback, which needs a [tls] section")


class ResidencyConfig(Section):
    """What is done with checkpoints before anybody asks for them."""

    prefetch: bool = Field(default=False, description="nodes read into memory what their next start would have to read")
    max_copies: int = Field(default=1, ge=1, description="of a checkpoint: up to so many are made unasked; 1: none is")


class ControllerConfig(Section):
    listen: Address = "127.0.0.1:7700"
    state_dir: Path
    tls: TlsConfig | None = None
    log: LogConfig = LogConfig()
    heartbeat_s: float = Field(default=2.0, gt=0)
    suspect_after: int = Field(default=3, ge=1, description="missed heartbeats")
    node_lease_s: float = Field(default=15.0, gt=0, description="a silent node is dead after this")
    queue_per_deployment: int = Field(default=256, ge=1, description="requests held at most")
    queue_per_gateway: int = Field(default=128, ge=1, description="of them from one gateway, over all deployments")
    max_start_failures: int = Field(default=3, ge=1, description="failed starts in a row before giving up")
    start_backoff_s: float = Field(default=1.0, ge=0, description="doubles with each failed start")
    stable_after_s: float = Field(default=10.0, ge=0, description="a replica that dies sooner is a failed start")
    displace: bool = Field(default=False, description="move what runs, if that lets waiting requests begin sooner")
    drain_s: float = Field(default=60.0, ge=0, description="time for running requests when a replica goes")
    record: Path | None = Field(default=None, description="every plan is appended here, with its snapshot")
    min_loaded_s: float = Field(default=1.0, ge=0, description="before a replica makes room for another deployment")
    swap_hold_s: float = Field(default=30.0, ge=0, description="requests are held so long at most to spare a swap")
    residency: ResidencyConfig = ResidencyConfig()

    @model_validator(mode="after")
    def _secure(self) -> Self:
        _needs_tls(self.tls, {"listen": self.listen})
        return self


class GatewayConfig(Section):
    listen: Address = "127.0.0.1:8080"
    controller: Address
    name: str = "gateway"
    state_dir: Path
    tls: TlsConfig | None = None
    log: LogConfig = LogConfig()
    allow_any_key: bool = False
    queue_timeout_s: float = Field(default=300.0, gt=0, description="a held request waits this long at most")
    recover_timeout_s: float = Field(default=300.0, gt=0, description="so does one whose replica was lost")
    silence_s: float = Field(default=8.0, gt=0, description="a host with requests that is silent for so long is dead")
    stall_s: float = Field(default=60.0, gt=0, description="so is one whose engine makes no step; five times its first")
    comment_after_s: float = Field(default=1.0, ge=0, description="then a held stream gets progress comments")
    comment_every_s: float = Field(default=1.0, gt=0)
    max_body_bytes: int = Field(default=10_000_000, gt=0)
    front_ends: int = Field(default=32, ge=1, description="of more, the longest unused are closed")

    @model_validator(mode="after")
    def _secure(self) -> Self:
        _needs_tls(self.tls, {"controller": self.controller})
        return self


class DevicesConfig(Section):
    """`kind = "auto"` takes the GPUs where there is a driver, else CPU slots. `memory_bytes` 0: divide what is free."""

    kind: Literal["auto", "cuda", "cpu"] = "auto"
    uuids: list[str] = Field(default_factory=list, description="which GPUs; empty: all")
    cpu_slots: int = Field(default=1, ge=1)
    cpu_threads: int = Field(default=0, ge=0, description="threads per slot; 0: divide the cores")
    memory_bytes: int = Field(default=0, ge=0, description="memory per CPU slot")


class StoreConfig(Section):
    """The checkpoint store (SSD) and the pool (DRAM). 0 means: all of the disk; a quarter of the free memory."""

    ssd_bytes: int = Field(default=0, ge=0)
    dram_bytes: int = Field(default=0, ge=0)
    prefault: bool = Field(default=True, description="fill the pool's memory at the start, not with the first loads")
    hugepages: Literal["auto", "never"] = Field(default="auto", description="use them where enough are reserved")
    lock: bool = Field(default=True, description="keep a pool that is prefaulted from being paged out")
    read_threads: int = Field(default=4, ge=1, le=64)


class SourcesConfig(Section):
    """Folders that `sllm checkpoint add` may read from on this node."""

    roots: list[Path] = Field(default_factory=lambda: [Path("/")])


class EngineConfig(Section):
    kind: Literal["vllm", "fake"] = "vllm"
    kv_cache_bytes: int = Field(default=_GIB // 4, gt=0, description="per replica, on CPU devices")
    grace_s: float = Field(
        default=60.0, gt=0, description="an engine host or store process without its agent ends after this"
    )
    start_timeout_s: float = Field(default=600.0, gt=0)
    stall_s: float = Field(default=60.0, gt=0, description="an engine with work that makes no step for so long is dead")
    bind_host: str = "127.0.0.1"
    stop_with_agent: bool = Field(
        default=False, description="an orderly stop of the agent stops engine hosts and the store process too"
    )


class AgentConfig(Section):
    name: Annotated[str, AfterValidator(_checked_node_name)]
    listen: Address = "127.0.0.1:7710"
    advertise: Address | None = Field(default=None, description="how others reach `listen`; None: the same")
    controller: Address
    state_dir: Path
    tls: TlsConfig | None = None
    log: LogConfig = LogConfig()
    devices: DevicesConfig = DevicesConfig()
    store: StoreConfig = StoreConfig()
    sources: SourcesConfig = SourcesConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _secure(self) -> Self:
        addresses = {
            "listen": self.listen,
            "controller": self.controller,
            "engine.bind_host": f"{self.engine.bind_host}:0",
        }
        _needs_tls(self.tls, addresses)
        return self


Config = TypeVar("Config", bound=Section)


def load(path: Path, model: type[Config]) -> Config:
    """Read and check a TOML file. Raises InvalidConfiguration with the file and the key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfiguration(f"cannot read configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"{path} is not TOML: {error}") from error
    return check(values, model, origin=str(path))


def check(values: dict[str, Any], model: type[Config], *, origin: str) -> Config:
    """Check values from anywhere; `origin` is how the error names them."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InvalidConfiguration(
            f"{origin}: {_first_problem(error)}", hint=f"known keys: {', '.join(_keys(model))}"
        ) from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "(top level)"
    if first["type"] == "extra_forbidden":
        return f"unknown key {place!r}"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]

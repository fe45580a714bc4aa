"""Loaders against each other and against the disk: one large model, an adapter, a mixture of many small experts.

All loaders of a case take turns within one run, the disk's own limit (fio) among them; each measurement is a process of
its own and begins with a cold cache.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import loader_fio as fio
from common import console
from loader_checkpoints import WRITERS, count_of, size_of, write_sllm
from loader_device import Device, huge_pages, plain_folder, ram_device
from loader_measure import MeasurementFailed, Sample, digest, drop_cache, in_fork, memory_limits, prewarm, timed
from loader_peers import (
    BARE,
    FAST,
    FRESH,
    LOAD_FILE,
    OURS,
    PEERS,
    POOL,
    RUNAI,
    RUNAI_DIRECT,
    TAILED,
    TENSORIZER,
    TORCH,
    UNVERIFIED,
    Loader,
    load_file,
    partitions,
)
from loader_report import Goal, Result, Samples, best_of, cpu_s_per_gb, ratio

FIO_TUNED = "fio, the best setting"
FIO_KEEPING = "fio, the best setting that keeps what it reads"
WARM_UP = "warm-up"  # the folder of a small checkpoint that is loaded before the clock: first calls are not speed
WARM_UP_KIND = "tiny"
OUR_NAMES = {loader.name for loader in (BARE, *OURS, TAILED)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`kind` of checkpoint, and the one that stands in for it with --quick; `goals` are read off the samples."""

    name: str
    title: str
    kind: str
    quick_kind: str
    loaders: Sequence[Loader]
    goals: Callable[[Samples, int], list[Goal]]
    limit_bps: int = 0  # of the disk; 0: as fast as it is


# --- goals ----------------------------------------------------------------------------------


class _Against:
    """Makes goals of the form "N times faster than", leaving out what was not measured."""

    def __init__(self, samples: Samples, ours: Loader) -> None:
        self._samples = samples
        self._ours = ours.name

    def peers(self, targets: dict[Loader, float]) -> list[Goal]:
        return [self._goal(peer.name, target) for peer, target in targets.items() if peer.name in self._samples]

    def runai(self, target: float) -> list[Goal]:
        """Against the better of its two ways to read."""
        names = [peer.name for peer in (RUNAI, RUNAI_DIRECT) if peer.name in self._samples]
        return [self._goal(best_of(self._samples, names), target)] if names else []

    def fio_plain(self, target: float) -> list[Goal]:
        name = fio.PLAIN.name
        return [self._goal(name, target)] if name in self._samples else []

    def fio_best(self, target: float) -> list[Goal]:
        names = [name for name in self._samples if name.startswith("fio")]
        return [self._goal(best_of(self._samples, names), target, FIO_TUNED)] if names else []

    def fio_keeping(self, target: float) -> list[Goal]:
        names = [setting.name for setting in fio.KEEPING if setting.name in self._samples]
        return [self._goal(best_of(self._samples, names), target, FIO_KEEPING)] if names else []

    def _goal(self, name: str, target: float, label: str = "") -> Goal:
        what = f"{self._ours}: time of {f'{label} ({name})' if label else name} / ours"
        return Goal(what=what, target=target, value=ratio(self._samples, name, self._ours))


def _cpu_goal(samples: Samples, size_bytes: int, loader: Loader, target: float) -> Goal:
    value = cpu_s_per_gb(samples, loader.name, size_bytes)
    return Goal(what=f"{loader.name}: CPU seconds per GB", target=target, value=value, at_least=False)


def fast_goals(samples: Samples, size_bytes: int) -> list[Goal]:
    pool, fresh = _Against(samples, POOL), _Against(samples, FRESH)
    return [
        *pool.peers({BARE: 0.97}),
        *pool.fio_keeping(0.97),
        *pool.fio_best(0.97),
        *pool.fio_plain(1.15),
        *pool.runai(1.8),
        *pool.peers({LOAD_FILE: 3, TORCH: 6}),
        *fresh.fio_plain(0.8),
        *fresh.runai(1.2),
        *fresh.peers({LOAD_FILE: 2.2, TORCH: 3.8, FAST: 2.8, TENSORIZER: 2.8}),
        _cpu_goal(samples, size_bytes, UNVERIFIED, 0.02),
        _cpu_goal(samples, size_bytes, POOL, 0.055),
    ]


def slow_goals(samples: Samples, size_bytes: int) -> list[Goal]:
    return [*_Against(samples, POOL).peers({BARE: 0.99}), *_Against(samples, POOL).fio_best(0.99)]


def lora_goals(samples: Samples, size_bytes: int) -> list[Goal]:
    peers = [peer.name for peer in PEERS if peer.name in samples]
    best = best_of(samples, peers)
    value = 1 / ratio(samples, best, POOL.name)
    return [Goal(what=f"{POOL.name}: time / {best}, the best peer", target=0.45, value=value, at_least=False)]


def moe_goals(samples: Samples, size_bytes: int) -> list[Goal]:
    tail_ms = statistics.median(sample.tail_s for sample in samples[TAILED.name]) * 1e3
    views = Goal(what=f"{TAILED.name}: last byte -> last view, ms", target=20, value=tail_ms, at_least=False)
    return [*_Against(samples, POOL).runai(1.7), views]


CASES = (
    Case(
        name="fast",
        title="1.2 GB, 254 tensors, cold, disk of about 7 GB/s",
        kind="1b",
        quick_kind="tiny",
        loaders=(BARE, *OURS, *PEERS),
        goals=fast_goals,
    ),
    Case(
        name="slow",
        title="1.2 GB, 254 tensors, cold, disk of 2 GB/s",
        kind="1b",
        quick_kind="tiny",
        loaders=(BARE, POOL, FRESH, LOAD_FILE, RUNAI, RUNAI_DIRECT, TORCH),
        goals=slow_goals,
        limit_bps=2_000_000_000,
    ),
    Case(
        name="lora",
        title="LoRA adapter, 100 MB, 448 tensors, cold",
        kind="lora",
        quick_kind="tiny",
        loaders=(POOL, FRESH, *PEERS),
        goals=lora_goals,
    ),
    Case(
        name="moe",
        title="mixture of experts, 1.6 GB, 10,143 tensors, cold",
        kind="moe",
        quick_kind="many",
        loaders=(POOL, TAILED, FRESH, LOAD_FILE, RUNAI, RUNAI_DIRECT, FAST, TENSORIZER, TORCH),
        goals=moe_goals,
    ),
)


# --- running --------------------------------------------------------------------------------


def run(case: Case, rounds: int, *, quick: bool) -> Result:
    kind = case.quick_kind if quick else case.kind
    left_out = {loader.name: f"{loader.package} is not installed" for loader in case.loaders if not loader.installed}
    loaders = [loader for loader in case.loaders if loader.installed]
    with ExitStack() as stack:
        formats = {loader.format for loader in loaders} | {"safetensors"}
        device = stack.enter_context(plain_folder() if quick else ram_device(size_of(kind) * len(formats)))
        unwritable = in_fork(lambda: write(kind, formats, device.folder))
        if case.limit_bps and not quick:
            device = stack.enter_context(device.throttled(case.limit_bps))
        huge = stack.enter_context(huge_pages(fio.buffer_bytes(size_of(kind)), reserve=not quick))
        settings = _fio_settings(huge, left_out)[: 2 if quick else None]
        race = Race(device=device, size_bytes=size_of(kind), left_out=left_out)
        race.leave_out(loaders, unwritable)
        samples = race.run([loader for loader in loaders if loader.format not in unwritable], settings, rounds)
    return Result(
        case=case.name,
        title=case.title,
        size_bytes=size_of(kind),
        samples=samples,
        goals=case.goals(samples, size_of(kind)),
        left_out=left_out,
        facts={
            "tensors": count_of(kind),
            "disk": device.name,
            "memory": memory_limits(),
            "quick": quick,
            "versions": _versions(loaders),
        },
    )


def _versions(loaders: Sequence[Loader]) -> dict[str, str]:
    versions = {loader.package: loader.version for loader in loaders}
    return versions | ({"fio": fio.version()} if fio.available() else {})


def _fio_settings(huge: bool, left_out: dict[str, str]) -> list[fio.Setting]:
    if not fio.available():
        left_out["fio"] = "it is not installed (Debian: apt-get install fio)"
        return []
    if not huge:
        left_out["fio, with buffers on huge pages"] = "no huge pages are reserved (vm.nr_hugepages)"
        return [fio.PLAIN]
    return [fio.PLAIN, *fio.TUNED, *fio.KEEPING]


def write(kind: str, formats: set[str], folder: Path) -> dict[str, str]:
    """Write the checkpoint into FOLDER/FORMAT, a small one to warm up with into FOLDER/WARM_UP/FORMAT. Return why a
    format could not be written, by its name. Runs in a fork: torch's threads must not be there at later forks."""
    unwritable = {}
    for name in sorted(formats - {"sllm"}):
        try:
            WRITERS[name](WARM_UP_KIND, folder / WARM_UP / name)
            WRITERS[name](kind, folder / name)
        except Exception as error:  # a peer's limits are its own
            unwritable[name] = f"it cannot write this checkpoint: {str(error)[:80]}"
            shutil.rmtree(folder / name, ignore_errors=True)
    if "sllm" in formats:
        write_sllm(folder / WARM_UP / "safetensors", folder / WARM_UP / "sllm")
        write_sllm(folder / "safetensors", folder / "sllm")
    return unwritable


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Loaders taking turns on one disk. A peer that fails leaves the race, and `left_out` says why; ours must not."""

    device: Device
    size_bytes: int
    left_out: dict[str, str]

    def leave_out(self, loaders: Sequence[Loader], unwritable: dict[str, str]) -> None:
        for loader in loaders:
            if loader.format in unwritable:
                self.left_out[loader.name] = unwritable[loader.format]

    def run(self, loaders: Sequence[Loader], settings: Sequence[fio.Setting], rounds: int) -> Samples:
        expected = in_fork(lambda: digest(load_file(self.device.folder / "safetensors")()))
        turns: dict[str, Callable[[], Sample]] = {s.name: partial(self._fio, s) for s in settings}
        turns |= {loader.name: partial(self._load, loader, expected) for loader in loaders}
        samples: Samples = {name: [] for name in turns}
        for number in range(rounds):
            first = number % len(turns)  # nobody always comes after the same one
            order = [*turns][first:] + [*turns][:first]
            for name in [name for name in order if name not in self.left_out]:
                self._turn(name, turns[name], samples)
            console.print(f"round {number + 1} of {rounds}: {POOL.name} {samples[POOL.name][-1].seconds:.3f} s")
        return {name: each for name, each in samples.items() if name not in self.left_out}

    def _turn(self, name: str, measure: Callable[[], Sample], samples: Samples) -> None:
        try:
            samples[name].append(measure())
        except MeasurementFailed as error:
            if name in OUR_NAMES:
                raise
            self.left_out[name] = str(error)

    def _fio(self, setting: fio.Setting) -> Sample:
        (file,) = partitions(self.device.folder / "sllm")
        drop_cache(file.parent)
        return fio.read(setting, file, self.device)

    def _load(self, loader: Loader, expected: str) -> Sample:
        sample = in_fork(lambda: self._load_here(loader))
        if sample.digest != expected:
            raise MeasurementFailed("it returned other tensors than were written")
        return sample

    def _load_here(self, loader: Loader) -> Sample:
        self.device.join()
        loader.prepare(self.device.folder / WARM_UP / loader.format)()
        load = loader.prepare(self.device.folder / loader.format)
        prewarm(self.size_bytes)
        drop_cache(self.device.folder / loader.format)
        return timed(load)

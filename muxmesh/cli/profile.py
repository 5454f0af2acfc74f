"""`muxmesh profile`: measures the step times of models on this machine into a file, for `muxmesh plan` and `simulate`.

Reads options, prepares the models, and shows progress and the result; `muxmesh.profiler` measures.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from muxmesh import __version__
from muxmesh.cli.common import ProgressBar, cache_dir, date_now, print_json, refuse_unwritable
from muxmesh.cli.operator_messages import OperatorMessages
from muxmesh.cli.preparation import MeshPreparation
from muxmesh.cli.profile_table import render
from muxmesh.clock import SystemClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import DEFAULT_MODEL, MeshConfig, UnitConfig
from muxmesh.cuda.device_list import DeviceList
from muxmesh.durations import duration_text
from muxmesh.errors import ConfigError
from muxmesh.machine_limits import memory_limit
from muxmesh.placement.measured_cells import Cell
from muxmesh.placement.profile import Profile
from muxmesh.placement.profile_file import read_profile
from muxmesh.profiler.grid import Grid, cells_of, default_batches, default_lengths, default_shares
from muxmesh.profiler.interference import groups_of
from muxmesh.profiler.machine_facts import cpu_facts, gpu_facts
from muxmesh.profiler.profiled_models import ProfiledModel, profiled_models
from muxmesh.profiler.recorder import ProfileRecorder, only_writer, read_before
from muxmesh.profiler.session import Effort, Session, Show
from muxmesh.profiler.timer_mesh import TimerMesh
from muxmesh.quoting import named

_MAX_PREFILL_TOKENS = {False: 2048, True: 16384}
"""Of a measured prefill, on a CPU and on a GPU, unless ``--max-prefill-tokens`` is given."""
_INTERVAL_S = 1.5
_BUSY = 0.3
"""A load average per core above this is that of a machine with something else to do."""


def run(arguments: argparse.Namespace) -> int:
    """Measures, or shows a file; returns the exit code. Raises ConfigError, EngineFailed or Unavailable.

    After Ctrl-C the file has all that was measured, and the same command continues.
    """
    _refuse_options(arguments)
    if arguments.show is not None:
        profile = read_profile(arguments.show)
        if arguments.json:
            print_json(_summary(arguments.show, profile))
        else:
            print(render(profile, arguments.show.name))
        return 0
    messages = OperatorMessages("profile", SystemClock())
    messages.use(None)
    refuse_unwritable(arguments.output)
    with only_writer(arguments.output):
        return _profile(arguments, messages)


def _refuse_options(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for options that contradict each other, so that none is ignored."""
    if arguments.show is not None and (arguments.models or arguments.config):
        raise ConfigError("--show: prints a file that is there; leave out the models and --config")
    if arguments.config is None:
        if arguments.unit is not None:
            raise ConfigError("--unit: is a unit of a mesh.yaml; name the file with --config")
        return
    if arguments.models:
        raise ConfigError("--config: names the models to profile; leave out the others, or leave out --config")
    for option in ("device", "dtype"):
        if getattr(arguments, option) is not None:
            raise ConfigError(f"--{option}: is for models that are named; those of --config have it in the file")


def _profile(arguments: argparse.Namespace, messages: OperatorMessages) -> int:
    given = None if arguments.config is not None else _config_of(arguments)
    before = None if arguments.restart else read_before(arguments.output)
    preparation = MeshPreparation(
        arguments.config, messages, memory_limit(), shows_progress=not arguments.quiet, config=given
    )
    mesh = preparation.prepare()
    models = profiled_models(mesh.config, mesh.prepared, arguments.unit)
    unit = models[0].unit
    is_limited = not unit.is_cuda or unit.limits_by_green_contexts or mesh.mps_program is not None
    grid = _grid(arguments, models, is_limited)
    devices = DeviceList().devices if unit.is_cuda else ()
    machine = gpu_facts(devices, unit.device_index) if unit.is_cuda else cpu_facts()
    recorder = ProfileRecorder(arguments.output, machine, models, __version__, date_now, before)
    num_sms = devices[unit.device_index].num_sms if unit.is_cuda else 0
    timers = TimerMesh(models, cache_dir(), mesh.device_uuids, mesh.mps_program, num_sms)
    return _measure(arguments, recorder, grid, models, timers)


def _config_of(arguments: argparse.Namespace) -> MeshConfig:
    """One unit with the models of the command line, or the default model. Raises ConfigError if one is named twice."""
    sources = arguments.models or [DEFAULT_MODEL]
    if len(set(sources)) < len(sources):
        raise ConfigError("MODEL: the same model is named twice; once is needed")
    settings = {"dtype": arguments.dtype} if arguments.dtype else {}
    models = tuple(
        ModelConfig.model_validate({"name": f"{_stem(source)}-{index}", "source": source, **settings})
        for index, source in enumerate(sources)
    )
    return MeshConfig(units=(UnitConfig(device=arguments.device or "cpu", models=models),))


def _stem(source: str) -> str:
    """A name for a model from its source, of the characters that names have."""
    return re.sub(r"[^A-Za-z0-9._-]+|^[._-]+", "-", Path(source).stem)[:48].strip("._-") or "model"


def _grid(arguments: argparse.Namespace, models: Sequence[ProfiledModel], is_limited: bool) -> Grid:
    """The grid of the options. Raises ConfigError for a share that cannot be enforced, or a model without any cell."""
    limits = [model.limits for model in models]
    shares = arguments.shares or default_shares(is_limited)
    if not is_limited and shares != (100,):
        raise ConfigError(
            f"--shares: nothing limits a worker of {models[0].unit.device} to a share; use --shares 100, install MPS "
            "(nvidia-cuda-mps-control), or set green_contexts of the unit in mesh.yaml"
        )
    grid = Grid(
        shares,
        arguments.batches or default_batches(limits),
        arguments.lengths or default_lengths(limits),
        arguments.max_prefill_tokens or _MAX_PREFILL_TOKENS[models[0].unit.is_cuda],
    )
    for one in limits:
        if not any(cells_of(grid, [one])):
            raise ConfigError(
                f"{named(one.name)}: has no cell: it computes batches of at most {one.max_num_seqs} sequences, of less "
                f"than {one.max_model_len} tokens each, and {one.max_kv_tokens} in all; see --batches and --lengths"
            )
    return grid


def _measure(
    arguments: argparse.Namespace,
    recorder: ProfileRecorder,
    grid: Grid,
    models: Sequence[ProfiledModel],
    timers: TimerMesh,
) -> int:
    limits = [model.limits for model in models]
    all_rounds, all_groups = cells_of(grid, limits), [] if arguments.no_interference else groups_of(grid, limits)
    rounds = [[cell for cell in cells if recorder.lacks(cell)] for cells in all_rounds]
    groups = [group for group in all_groups if recorder.lacks_group(group)]
    num_all, num_left = sum(map(len, all_rounds)) + len(all_groups), sum(map(len, rounds)) + len(groups)
    if num_left < num_all and not arguments.quiet:
        print(f"muxmesh: {arguments.output} has {num_all - num_left} of {num_all} measurements", file=sys.stderr)
    if num_left:
        _warn_of_load(arguments.quiet)
    effort = Effort(arguments.repeats, arguments.cell_seconds, _INTERVAL_S, arguments.budget)
    clock = SystemClock()
    started_at_s = clock.monotonic_s()
    session = Session(timers.open, recorder, effort, clock, _shown(arguments.quiet))

    async def measure() -> int:
        async with timers:
            return await session.run(rounds, groups)

    try:
        left = asyncio.run(measure()) if num_left else 0
    except KeyboardInterrupt:
        _end_line(arguments.quiet)
        print(f"muxmesh: interrupted; {_state(arguments.output, recorder, all_rounds, all_groups)}", file=sys.stderr)
        raise
    if left:
        _end_line(arguments.quiet)
    for reason in session.left_out:
        print(f"muxmesh: not measured: {reason}", file=sys.stderr)
    if left > len(session.left_out):
        print(f"muxmesh: stopped; {_state(arguments.output, recorder, all_rounds, all_groups)}", file=sys.stderr)
    if arguments.json:
        took_s = clock.monotonic_s() - started_at_s
        run = {"measurements": num_all, "left": left, "left_out": session.left_out, "took_s": took_s}
        print_json({**_summary(arguments.output, recorder.profile), **run})
    else:
        print(render(recorder.profile, arguments.output.name))
    return 0


def _warn_of_load(quiet: bool) -> None:
    """What other programs take of the cores is measured too."""
    load = os.getloadavg()[0]
    if load > _BUSY * (os.cpu_count() or 1) and not quiet:
        print(
            f"muxmesh: other programs compute on this machine (load average {load:.1f}); all times will be longer and "
            "less certain",
            file=sys.stderr,
        )


def _state(
    output: Path, recorder: ProfileRecorder, rounds: Sequence[Sequence[Cell]], groups: Sequence[Sequence[Cell]]
) -> str:
    cells = [cell for one in rounds for cell in one]
    left = sum(map(recorder.lacks, cells)) + sum(map(recorder.lacks_group, groups))
    total = len(cells) + len(groups)
    return f"{output} has {total - left} of {total} measurements, and the same command continues"


def _summary(path: Path, profile: Profile) -> dict[str, Any]:
    return {
        "file": str(path),
        "machine": asdict(profile.machine),
        "contention": profile.contention,
        "contention_error": profile.contention_error,
        "models": {
            name: {
                "cells": len(model.samples),
                "spread": model.median_spread,
                "outliers": model.num_outliers,
            }
            for name, model in profile.models.items()
            if model.samples
        },
    }


def _end_line(quiet: bool) -> None:
    """Ends the line of a progress bar that is not complete."""
    if not quiet and sys.stderr.isatty():
        print(file=sys.stderr)


def _shown(quiet: bool) -> Show:
    if quiet:
        return lambda what, done, total, left_s: None
    bar, is_terminal = ProgressBar("profile"), sys.stderr.isatty()

    def show(what: str, done: int, total: int, left_s: float | None) -> None:
        left = "" if left_s is None else f"{duration_text(left_s)} left"
        width = max(0, shutil.get_terminal_size().columns - 80) if is_terminal else 0
        bar("measured", done, total, ", ".join(filter(None, (left, what[:width]))))

    return show

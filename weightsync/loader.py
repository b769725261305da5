"""Our weight loader inside SGLang: `--custom-weight-loader weightsync.loader.load`.

It runs in every rank of an engine, with the model at hand. It takes the ticket, opens the image, copies,
compares, and reports to the agent. An exception would end the server, and half-copied weights must not
generate: so it never raises, and the report says whether anything may have been changed.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from weightsync.errors import WeightSyncError
from weightsync.image import Image
from weightsync.manifest import Manifest, decode_manifest, digest_of
from weightsync.plan import Plan, live_tensors, uncovered, watch
from weightsync.ticket import FOLDER, Report, Ticket, answer, read_ticket

_PLAN = "slipstream_plan"
"""The model's attribute that keeps its plan: it goes with the model."""


def load(model: torch.nn.Module, named_tensors: Iterable[Any]) -> None:
    """Loads what the ticket says; SGLang's own argument is empty. Never raises."""
    began, folder = time.perf_counter(), Path(os.environ[FOLDER])
    try:
        report = _obey(model, read_ticket(folder))
    except WeightSyncError as error:
        report = Report(-1, os.getpid(), problem=str(error))
    answer(folder, msgspec.structs.replace(report, seconds=time.perf_counter() - began))


def _obey(model: torch.nn.Module, ticket: Ticket) -> Report:
    """What becomes of a ticket."""
    report = Report(ticket.number, os.getpid())
    touched = False
    try:
        manifest = decode_manifest(ticket.manifest, digest_of(ticket.manifest))
        opened = Image.open(ticket.image, manifest.size)
        try:
            image = _mapped(opened)
        finally:
            opened.close()
        tensors = {
            entry.name: _view(image, entry.offset, entry.dtype, entry.shape) for entry in manifest.tensors
        }
        known: Plan | None = getattr(model, _PLAN, None)
        touched = True
        if known is not None and not known.reason and known.fits(manifest.layout, model):
            plan, way = known, "plan"
            with torch.no_grad():
                plan.copy(image)
        else:
            plan, way = _by_names(model, manifest, image, tensors), "names"
        # What was loaded by names was compared when it was watched, or computes what cannot be compared.
        if ticket.check and way == "plan" and (unequal := plan.unequal(image)):
            raise WeightSyncError(f"{unequal} of {len(plan.copies)} copies are not what was staged")
        _synchronize(model)
    except Exception as error:  # noqa: BLE001 - reported, not raised
        problem = f"version {ticket.number}: {type(error).__name__}: {error}"
        return msgspec.structs.replace(report, problem=problem, touched=touched)
    return msgspec.structs.replace(
        report,
        way=way,
        reason=plan.reason,
        tensors=len(live_tensors(model)),
        copies=len(plan.copies),
        layout=layout_of(model),
    )


def _by_names(
    model: torch.nn.Module, manifest: Manifest, image: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> Plan:
    """Loads by Hugging Face names, and keeps the plan of it on the model."""
    plan = watch(model, manifest.layout, image, tensors, model.load_weights)
    if not plan.reason and (missing := uncovered(plan, model)):
        raise WeightSyncError(
            f"{len(missing)} tensors of the engine are not filled: {', '.join(missing[:3])}; the exported "
            "names are not those of this model"
        )
    setattr(model, _PLAN, plan)
    return plan


def _mapped(image: Image) -> torch.Tensor:
    """The image as uint8 [bytes]; the mapping lives as long as the tensor."""
    # Private: torch wants memory that could be written, a sealed image has none; nobody writes.
    mapping = mmap.mmap(image.descriptor, image.size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _view(image: torch.Tensor, offset: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    count = torch.Size(shape).numel() * kind.itemsize
    return image[offset : offset + count].view(kind).view(shape)


def layout_of(model: torch.nn.Module) -> str:
    """Fingerprint of a model's own tensors: names, dtypes, shapes; hex."""
    rows = [[name, str(tensor.dtype), tuple(tensor.shape)] for name, tensor in live_tensors(model).items()]
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(rows))


def _synchronize(model: torch.nn.Module) -> None:
    """Waits for the device, which copies behind our back."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()

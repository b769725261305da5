"""Our weight loader inside SGLang: `--custom-weight-loader weightsync.loader.load`.

It runs in every rank of an engine, with the model at hand. It takes the ticket, opens the image, copies,
compares, and reports to the agent. An exception would end the server, and half-copied weights must not
generate: so it never raises, and the report says whether anything may have been changed.

A version in host memory was verified by the agent and cannot change. One in GPU memory is verified here,
where it lies, before anything is copied, and its owner must live on until everything is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import xxhash

from weightsync.checksum import verify
from weightsync.errors import WeightSyncError
from weightsync.image import Image
from weightsync.manifest import Manifest, decode_manifest, digest_of
from weightsync.plan import Plan, live_tensors, uncovered, watch
from weightsync.slot import opened
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
        with _image_of(ticket, manifest) as image:
            touched = True
            plan, way = _fill(model, manifest, image, ticket.check)
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


@contextmanager
def _image_of(ticket: Ticket, manifest: Manifest) -> Iterator[torch.Tensor]:
    """The verified image as uint8 [bytes], on the device where it lies.

    Raises `SourceError`; after the block, where it may have become another one meanwhile.
    """
    if ticket.gpu:
        with opened(ticket.image, manifest) as image:
            verify(manifest, image)
            yield image
        return
    sealed = Image.open(ticket.image, manifest.size)
    try:
        mapped = torch.frombuffer(sealed.private(), dtype=torch.uint8)
    finally:
        sealed.close()
    yield mapped


def _fill(
    model: torch.nn.Module, manifest: Manifest, image: torch.Tensor, check: bool
) -> tuple[Plan, Literal["plan", "names"]]:
    """Copies by the plan that is known, or loads by names."""
    known: Plan | None = getattr(model, _PLAN, None)
    if known is None or known.reason or not known.fits(manifest.layout, model):
        # What is loaded by names is compared as it is watched, or computes what cannot be compared.
        return _by_names(model, manifest, image), "names"
    with torch.no_grad():
        known.copy(image)
    if check and (unequal := known.unequal(image)):
        raise WeightSyncError(f"{unequal} of {len(known.copies)} copies are not what was staged")
    return known, "plan"


def _by_names(model: torch.nn.Module, manifest: Manifest, image: torch.Tensor) -> Plan:
    """Loads by Hugging Face names, and keeps the plan of it on the model."""
    tensors = {entry.name: _view(image, entry.offset, entry.dtype, entry.shape) for entry in manifest.tensors}
    plan = watch(model, manifest.layout, image, tensors, model.load_weights)
    if not plan.reason and (missing := uncovered(plan, model)):
        raise WeightSyncError(
            f"{len(missing)} tensors of the engine are not filled: {', '.join(missing[:3])}; the exported "
            "names are not those of this model"
        )
    setattr(model, _PLAN, plan)
    return plan


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

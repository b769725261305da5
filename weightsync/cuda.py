"""CUDA's driver, as far as memory shared between processes needs it. To look at the cards makes no context.

Memory that others open is plain memory of the driver's, not torch's: torch hands out parts of larger
blocks, and its own way of sharing binds both sides to one release of it.

    address = driver().allocate(0, 1 << 30)         # on the first card that this process sees
    handle = driver().export(0, address)            # 64 bytes, for any other process of the host
    there = driver().open(0, handle)                # in that process
    driver().close(0, there)
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from weightsync.errors import NoCuda, SourceError

if TYPE_CHECKING:
    import torch

_LAZY_PEER_ACCESS = 1
_BLOCK = 2 << 20
"""Memory of less than this shares a block with other memory, which a handle would open along with it."""


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * 64),)


class Driver:
    """The driver of this process's cards, which are numbered as torch numbers them: `driver()`.

    Raises `NoCuda` where there is no driver or no card; whatever else fails is a `SourceError`.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoCuda(f"no CUDA driver on this host: {error}") from error
        if status := self._library.cuInit(0):
            raise NoCuda(f"no CUDA GPU that this process sees: {self._told(status)}")
        self._contexts: dict[int, ctypes.c_void_p] = {}

    def cards(self) -> list[str]:
        """The identity of every card that this process sees; a card has the same in all processes."""
        count = ctypes.c_int()
        self._do("cuDeviceGetCount", ctypes.byref(count))
        found = []
        for ordinal in range(count.value):
            identity = (ctypes.c_ubyte * 16)()
            self._do("cuDeviceGetUuid_v2", ctypes.byref(identity), self._device(ordinal))
            found.append(str(uuid.UUID(bytes=bytes(identity))))
        return found

    def free_bytes(self, ordinal: int) -> int:
        """Memory of a card that nobody has."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._current(ordinal):
            self._do("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, ordinal: int, size: int) -> int:
        """The address of new memory that can be exported."""
        address = ctypes.c_uint64()
        with self._current(ordinal):
            self._do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(-(-size // _BLOCK) * _BLOCK))
        return address.value

    def free(self, ordinal: int, address: int) -> None:
        """Gives memory back; nobody may have it open."""
        with self._current(ordinal):
            self._do("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, ordinal: int, address: int) -> bytes:
        """What another process of this host opens memory by."""
        handle = _Handle()
        with self._current(ordinal):
            self._do("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, ordinal: int, handle: bytes) -> int:
        """The address here of another process's memory. `ordinal` is the card that has it."""
        address = ctypes.c_uint64()
        given = _Handle.from_buffer_copy(handle)
        with self._current(ordinal):
            self._do("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, _LAZY_PEER_ACCESS)
        return address.value

    def close(self, ordinal: int, address: int) -> None:
        """Ends what `open` began."""
        with self._current(ordinal):
            self._do("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    @contextmanager
    def _current(self, ordinal: int) -> Iterator[None]:
        """The card's primary context, which torch uses too, is this thread's; it is kept for ever."""
        if ordinal not in self._contexts:
            context = ctypes.c_void_p()
            self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(ordinal))
            self._contexts[ordinal] = context
        self._do("cuCtxPushCurrent_v2", self._contexts[ordinal])
        try:
            yield
        finally:
            self._do("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _device(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._do("cuDeviceGet", ctypes.byref(device), ordinal)
        return device

    def _do(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise SourceError(f"CUDA: {name}: {self._told(status)}")

    def _told(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        return text.value.decode() if text.value else f"status {status}"


@cache
def driver() -> Driver:
    """This process's. Raises `NoCuda`."""
    return Driver()


def visible_cards() -> list[str]:
    """`Driver.cards`; none where there is no CUDA."""
    try:
        return driver().cards()
    except NoCuda:
        return []


class _Memory:
    """Memory of a card as torch and others take it over without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def tensor_at(address: int, size: int, ordinal: int) -> torch.Tensor:
    """A view of memory of a card, uint8 [size]; it does not keep the memory."""
    import torch

    return torch.as_tensor(_Memory(address, size), device=torch.device("cuda", ordinal))

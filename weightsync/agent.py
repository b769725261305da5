"""The weight agent beside an engine: brings versions into local memory while generation goes on.

    idle -> staging v -> staged v -> applying v -> serving v
              |  every source failed: says so, tries again     |  untouched: says so, tries again
              |  v too old by now: takes the newest            |  anything else: the engine is given up

The newest version offered is the one wanted. A pull that has begun is finished as long as groups written
by that version could still be trained, or a pull longer than a step would never end. What was verified
stays, whichever source it came from. Nothing is applied before Redis says that it is committed, under
the epoch of the learner that offered it.

    agent = Agent(holder, transports, engine=engine, registry=registry, lag=2, log=print)
    task = asyncio.create_task(agent.run())
    agent.hear(offer)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from weightsync.errors import SourceError, Superseded, Untouched, WeightSyncError
from weightsync.guard import Place
from weightsync.holder import Held, Holder
from weightsync.image import Image
from weightsync.manifest import Manifest, decode_manifest
from weightsync.protocol import Offer, Source
from weightsync.staging import Staging
from weightsync.transports.base import Transport

RETRY_S = 1.0
"""Between two attempts at a version that no source gave, or that the engine refused."""
COMMIT_LOOK_S = 0.05
"""Between two looks whether a staged version is committed."""

Standing = Literal["committed", "open", "void"]
"""Of an offered version: `open` may still be committed; `void` never will be under that epoch."""


class Port(Protocol):
    """The engine, as its agent sees it."""

    async def serve(self, held: Held) -> None:
        """Loads a staged version and serves it from now on.

        Raises `Untouched` if the engine still serves the old one entirely; whatever else it raises ends the
        agent: the engine's weights are then unknown.
        """
        ...


class Registry(Protocol):
    """What Redis knows, as an agent asks it."""

    async def standing(self, offer: Offer) -> Standing:
        """Whether an offered version is committed."""
        ...

    async def siblings(self, label: str) -> list[Source]:
        """Other agents that hold a version."""
        ...


class Agent:
    """Stages and applies versions for one engine. `hear` may be called at any time; `run` until cancelled."""

    def __init__(
        self,
        holder: Holder,
        transports: Sequence[Transport],
        *,
        engine: Port,
        registry: Registry,
        lag: int,
        log: Callable[[str], None],
    ) -> None:
        """`transports` are tried in their order; `lag` is how many versions behind one is still of use."""
        self.state = "idle"
        """What it is at, for `launch status`."""
        self.stage_s = self.apply_s = 0.0
        """Seconds that the last version took to stage, and to apply."""
        self.way = ""
        """The transport of the last version staged."""
        self.staged_versions = 0
        """Versions staged so far."""
        self._holder, self._transports = holder, transports
        self._engine, self._registry, self._lag, self._log = engine, registry, lag, log
        self._wanted: Offer | None = None
        self._served = self._void = ""
        self._changed = asyncio.Event()
        self._staging: tuple[str, Staging] | None = None
        self._ended, self._fetching = threading.Event(), threading.Lock()
        self._told, self._avoided = "", ("", "")

    def hear(self, offer: Offer) -> None:
        """Takes note of an offer; one of an older version, or of a learner that was replaced, is ignored."""
        if self._wanted is None or offer.place > self._wanted.place:
            self._wanted, self._void = offer, ""
            self._changed.set()

    async def run(self) -> None:
        """Brings the engine to the newest version, again and again. Raises what `Port.serve` raises."""
        try:
            while True:
                offer = await self._next()
                held = await self._stage(offer)
                if held is not None and await self._apply(offer, held):
                    await asyncio.to_thread(self._holder.reserve.refill)
                else:
                    await self._pause()
        finally:
            self._ended.set()
            if self._fetching.acquire(blocking=False):  # else the thread sees the end and does it
                self._forget()

    async def _next(self) -> Offer:
        """The newest offer, once it is not what is served already."""
        while self._wanted is None or self._wanted.label in (self._served, self._void):
            self._changed.clear()
            await self._changed.wait()
        return self._wanted

    async def _pause(self) -> None:
        """Waits a little, or for another offer."""
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), RETRY_S)
        except TimeoutError:
            return

    async def _stage(self, offer: Offer) -> Held | None:
        """The version in local memory, verified; None if no source gave it, or it is of no use any more."""
        began = time.monotonic()
        siblings = await self._registry.siblings(offer.label)
        self.state = f"staging {offer.version}"
        try:
            manifest, image = await asyncio.to_thread(self._fetch, offer, [*offer.sources, *siblings])
        except Superseded as error:
            self._say(str(error))
            return None
        except WeightSyncError as error:
            self.state = f"behind: {error}"
            self._say(f"version {offer.version} cannot be staged: {error}")
            return None
        self.stage_s, self.state = time.monotonic() - began, f"staged {offer.version}"
        self.staged_versions += 1
        return self._holder.keep(manifest, image)

    async def _apply(self, offer: Offer, held: Held) -> bool:
        """Applies a staged version once it is committed; whether the engine serves it now."""
        while (standing := await self._registry.standing(offer)) == "open":
            if self._useless(offer):
                return False
            await asyncio.sleep(COMMIT_LOOK_S)
        if standing == "void":
            self._say(f"version {offer.version} of epoch {offer.epoch} was never committed: it is forgotten")
            if self._wanted is offer:
                self._void = offer.label
            return False
        began, self.state = time.monotonic(), f"applying {offer.version}"
        try:
            await self._engine.serve(held)
        except Untouched as error:
            self.state = f"behind: {error}"
            self._say(f"version {offer.version} is refused, the engine serves the old one: {error}")
            if held.place is not None:
                # Only the engine can read it there, and cannot: it comes another way now.
                self._avoided = (offer.label, self.way)
            return False
        self._served, self.apply_s = offer.label, time.monotonic() - began
        self.state = f"serving {offer.version}"
        return True

    def _useless(self, offer: Offer) -> bool:
        """Whether groups of a version could not be trained any more: it is too old, or of a lineage left."""
        wanted = self._wanted
        assert wanted is not None
        return wanted.lineage != offer.lineage or wanted.version - offer.version > self._lag

    def _fetch(self, offer: Offer, sources: Sequence[Source]) -> tuple[Manifest, Image | Place]:
        """The version from the first sources that give it (in a thread). What is of no use is forgotten."""
        with self._fetching:
            try:
                return self._pull(offer, sources)
            except Superseded:
                self._forget()
                raise

    def _forget(self) -> None:
        if self._staging is not None:
            self._staging[1].close()
            self._staging = None

    def _pull(self, offer: Offer, sources: Sequence[Source]) -> tuple[Manifest, Image | Place]:
        problems: list[str] = []
        for transport, source in self._ways(offer, sources, None):
            try:
                staging = self._staging_of(offer, transport.manifest(source, offer.label))
                break
            except WeightSyncError as error:
                problems.append(str(error))
        else:
            raise SourceError(
                "; ".join(problems) or f"none of {len(sources)} sources can be reached from here"
            )
        for transport, source in self._ways(offer, sources, staging):
            try:
                transport.fetch(source, offer.label, staging)
                self._staging, self.way = None, transport.kind
                return staging.manifest, staging.finish()
            except SourceError as error:
                problems.append(str(error))
        raise SourceError("; ".join(problems))

    def _ways(
        self, offer: Offer, sources: Sequence[Source], staging: Staging | None
    ) -> list[tuple[Transport, Source]]:
        return [
            (transport, source)
            for transport in self._transports
            for source in sources
            if source.kind == transport.kind
            and (offer.label, transport.kind) != self._avoided
            and transport.reaches(source, staging)
        ]

    def _staging_of(self, offer: Offer, encoded: bytes) -> Staging:
        """The staging of an offer: one that broke off goes on."""
        if self._staging is not None:
            if self._staging[0] == offer.label:
                return self._staging[1]
            self._forget()
        manifest = decode_manifest(encoded, offer.manifest)

        def go_on() -> None:
            if self._ended.is_set():
                raise Superseded("the agent has ended")
            if self._useless(offer):
                raise Superseded(f"version {offer.version} is of no use by now: another is wanted")

        parent = self._holder.parent_of(manifest)
        staging = Staging(manifest, parent, go_on, self._holder.reserve.allocate)
        self._staging = (offer.label, staging)
        return staging

    def _say(self, text: str) -> None:
        """Logs what was not said just before."""
        if text != self._told:
            self._log(f"weights: {text}")
        self._told = text

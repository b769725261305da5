"""Whether a Redis is set up so that nothing is lost and nobody gets in: the findings of `launch doctor`."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
import redis
from redis.exceptions import NoPermissionError

from buffer.acl import without_user
from buffer.client import LIBRARY, Stream
from buffer.connect import connect, primaries
from buffer.errors import NoRun, RedisUnsuitable, RightMissing
from buffer.keys import RUNS
from buffer.ledger import Snapshot

_ALL_ADDRESSES = ("*", "0.0.0.0", "::", "")
_PAYLOAD_SHARE = 0.75
"""Of `maxmemory`, what payloads may take: the rest is for control state and buffers."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    what: str
    """The thing, such as `connection`; on a cluster with the node's address."""
    verdict: Literal["ok", "wrong", "unknown"]
    """`unknown`: the user of the URL may not look; ask again as an administrator."""
    found: str
    """How it is, in words."""
    advice: str = ""
    """What to do, if it is wrong."""


def examine(url: str, run: str | None = None) -> list[Finding]:
    """Looks at the server of `url`, and at the payload limits of its runs or of one.

    Raises `RedisUnavailable` if nobody answers there.
    """
    try:
        client = connect(url)
    except RedisUnsuitable as error:
        return [Finding("server", "wrong", str(error), "see above; nothing else could be looked at")]
    findings = [_way_there(url), _anonymous(url)]
    for node in primaries(client):
        where = _address(node) if isinstance(client, redis.RedisCluster) else ""
        findings += [_named(finding, where) for finding in _settings(node)]
    findings += _limits(client, run)
    client.close()
    return findings


def _named(finding: Finding, where: str) -> Finding:
    return msgspec.structs.replace(finding, what=f"{finding.what} of {where}") if where else finding


def _address(node: redis.Redis) -> str:
    options = node.get_connection_kwargs()
    return f"{options['host']}:{options['port']}"


def _way_there(url: str) -> Finding:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "unix":
        return Finding("connection", "ok", "a unix socket")
    if host in ("localhost", "::1") or host.startswith("127."):
        return Finding("connection", "ok", f"loopback ({host})")
    if parts.scheme == "rediss":
        return Finding("connection", "ok", f"TLS to {host}")
    return Finding(
        "connection",
        "wrong",
        f"no TLS to {host}: passwords and payloads can be read on the way",
        "give the server a certificate (tls-port, tls-cert-file, tls-key-file) and write rediss://",
    )


def _anonymous(url: str) -> Finding:
    try:
        connect(without_user(url)).close()
    except RedisUnsuitable:
        return Finding("default user", "ok", "off, or has a password")
    return Finding(
        "default user",
        "wrong",
        "anybody who reaches the server may do everything",
        "make users with `launch redis-users`, then `ACL SETUSER default off`; or set requirepass",
    )


def _settings(node: redis.Redis) -> list[Finding]:
    server, memory = _info(node, "server"), _info(node, "memory")
    version = str(server.get("valkey_version") or server["redis_version"])
    findings = [Finding("version", "ok", version), _policy(str(memory["maxmemory_policy"]))]
    try:
        settings: Any = node.config_get("bind", "protected-mode", "appendonly", "appendfsync")
        libraries: Any = node.execute_command("FUNCTION", "LIST", "LIBRARYNAME", LIBRARY)
    except NoPermissionError as error:
        return [*findings, Finding("settings", "unknown", f"an administrator may look: {error}")]
    return [*findings, _bind(settings), _syncing(settings), _library(libraries)]


def _info(node: redis.Redis, section: str) -> dict[str, Any]:
    found: Any = node.info(section)
    return found


def _policy(policy: str) -> Finding:
    if policy == "noeviction":
        return Finding("maxmemory-policy", "ok", policy)
    return Finding(
        "maxmemory-policy",
        "wrong",
        f"{policy}: when memory runs short, Redis deletes keys of runs",
        "CONFIG SET maxmemory-policy noeviction",
    )


def _bind(settings: dict[str, str]) -> Finding:
    addresses = [address.removeprefix("-") for address in settings["bind"].split()] or [""]
    wide = any(address in _ALL_ADDRESSES for address in addresses)
    if not wide and settings["protected-mode"] == "yes":
        return Finding("address", "ok", f"bound to {settings['bind']}")
    return Finding(
        "address",
        "wrong",
        f"bound to {settings['bind'] or 'all interfaces'}, protected-mode {settings['protected-mode']}",
        "bind it to loopback or a private interface, and set protected-mode yes",
    )


def _syncing(settings: dict[str, str]) -> Finding:
    found = f"appendonly {settings['appendonly']}, appendfsync {settings['appendfsync']}"
    if settings["appendonly"] == "yes" and settings["appendfsync"] == "always":
        return Finding("durability", "ok", found)
    return Finding(
        "durability",
        "wrong",
        f"{found}: a crash loses groups that were acknowledged",
        "CONFIG SET appendonly yes, CONFIG SET appendfsync always",
    )


def _library(libraries: list[Any]) -> Finding:
    if libraries:
        return Finding("library", "ok", LIBRARY)
    return Finding(
        "library",
        "wrong",
        f"{LIBRARY} is not loaded: actors wait",
        "start a learner of this release, which loads it",
    )


def _limits(client: redis.Redis, run: str | None) -> list[Finding]:
    """The payload limit of each run against the memory of its server, or of all nodes if it has shards."""
    try:
        members: Any = client.smembers(RUNS)
        names = [run] if run else sorted(name.decode() for name in members)
        memory = [int(_info(node, "memory")["maxmemory"]) for node in primaries(client)]
        return [_limit(client, name, memory) for name in names]
    except RightMissing as error:
        return [Finding("payload limit", "unknown", str(error))]


def _limit(client: redis.Redis, name: str, memory: list[int]) -> Finding:
    what = f"payload limit of {name}"
    try:
        ledger = Stream(client, name).call(Snapshot())
    except NoRun as error:
        return Finding(what, "wrong", str(error), "give the name of a run that is there")
    limit, room = ledger.number("bytes_limit"), sum(memory) if ledger.number("shards") else min(memory)
    if not all(memory):
        return Finding(what, "ok", "the server has no maxmemory")
    if 0 < limit <= room * _PAYLOAD_SHARE:
        return Finding(what, "ok", f"{limit >> 20} of {room >> 20} MiB")
    return Finding(
        what,
        "wrong",
        f"{f'{limit >> 20} MiB' if limit else 'none'}, maxmemory is {room >> 20} MiB",
        f"set stream.payload_mib to at most {int(room * _PAYLOAD_SHARE) >> 20}, or raise maxmemory",
    )


def render(findings: list[Finding]) -> str:
    """The findings as text, what is wrong with what to do."""
    lines = []
    for finding in findings:
        mark = {"ok": "ok   ", "wrong": "WRONG", "unknown": "?    "}[finding.verdict]
        lines.append(f"{mark}  {finding.what}: {finding.found}")
        if finding.advice:
            lines.append(f"       -> {finding.advice}")
    return "\n".join(lines)

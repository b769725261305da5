"""Users of a Redis server, one a role: the one table of who may do what, and making them.

A function runs under its caller's rights, so a role needs, beside the functions it calls, the commands and
keys those use. An ACL keeps roles and runs apart; it is no proof against a malicious actor, which writes the
run's control keys through its functions and can as well write them badly.

    created = create_users(client, "demo")          # -> {"learner-demo": "vT3...", ...}: new passwords
    with_user("redis://10.0.0.5:6379", "actor-demo", created["actor-demo"])
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec
from redis.exceptions import NoPermissionError, ResponseError

from buffer.client import LIBRARY
from buffer.connect import primaries
from buffer.errors import RedisUnsuitable
from buffer.keys import RUNS

FUNCTION_READS = (
    "exists", "hget", "hgetall", "hkeys", "hlen", "hrandfield", "hvals", "lindex", "llen", "lrange",
    "time", "xlen", "xrange", "xrevrange", "zcard", "zrange", "zrangebyscore", "zscore",
)  # fmt: skip
"""Commands by which functions read."""
FUNCTION_WRITES = (
    "del", "hdel", "hincrby", "hset", "lpop", "lpush", "lrem", "ltrim", "rpush", "set",
    "xadd", "xdel", "zadd", "zrem",
)  # fmt: skip
"""Commands by which functions write. A role that writes has all of both, and all keys that functions write: a
call first finishes what another role's call left over when it broke off."""
CONNECTING = ("info", "command", "cluster|slots")
"""What a client asks a server, or a cluster, before anything else."""

FUNCTION_KEYS = (
    "", "state", "counts", "outstanding", "leases", "leased", "ready", "groups", "prompts", "prompt", "work",
    "actors", "epochs", "stream", "versions", "times", "manifests", "places", "bell", "staleness", "step",
    "joins", "skip", "forks", "holds", "trash", "dead",
)  # fmt: skip
"""Keys that functions write, and the run's bare name, by which they are called. Redis tries patterns in this
order, so those of `admit` and `publish` come first."""
SHARDS = "/*"
"""Stands for a run's shards among a role's keys. Of all runs, `{*}:stream` and its like mean them, too."""


class Role(msgspec.Struct, frozen=True):
    """What one kind of process may do: its row of the table."""

    name: str
    """Such as `learner`; the Redis user that is made for it has it in its name."""
    purpose: str
    """One line for people: what such a process does."""
    calls: tuple[str, ...]
    """Functions it calls."""
    looks: tuple[str, ...]
    """Functions it calls that only read."""
    commands: tuple[str, ...]
    """Plain commands, those of its functions among them."""
    writes: tuple[str, ...]
    """Keys of the run that it reads and writes; `runs` is the server's."""
    reads: tuple[str, ...]
    """Keys it only reads; `*` is every key of the run."""


ROLES = (
    Role(
        name="learner",
        purpose="trains a run and owns it: creates it, feeds, assigns, commits, forks, sweeps",
        calls=("join", "heartbeat", "feed", "assign", "strike", "commit", "reconcile", "fork", "leave"),
        looks=("snapshot", "aged"),
        commands=(*FUNCTION_READS, *FUNCTION_WRITES, "sadd", "blpop", "expire", "function|load"),
        writes=(
            *FUNCTION_KEYS,
            SHARDS,
            "config",
            "files",
            "curriculum",
            "environment",
            "progress",
            "mail:*",
            "scores:*",
            "routing",
            "routed:*",
            "stop",
            "evaluations",
            RUNS,
        ),
        reads=("difficulty",),
    ),
    Role(
        name="actor",
        purpose="generates for runs: joins, leases, publishes",
        calls=("join", "admit", "heartbeat", "publish", "applied", "drop", "leave"),
        looks=("snapshot",),
        commands=(
            *(*FUNCTION_READS, *FUNCTION_WRITES),
            *("get", "smembers", "blpop", "expire", "incrby", "hincrbyfloat", "multi", "exec"),
        ),
        writes=(
            *(*FUNCTION_KEYS, SHARDS, "mail:*", "scores:*", "routing", "routed:*"),
            *("difficulty", "actor_numbers", "fleet"),
        ),
        reads=("config", "files", "progress", "stop", RUNS),
    ),
    Role(
        name="viewer",
        purpose="looks, and can change nothing: status, inspect, verify",
        calls=(),
        looks=("snapshot", "aged"),
        commands=(
            *("exists", "hget", "hgetall", "hlen", "hvals", "llen", "lrange", "time", "xlen", "xrange"),
            *("xrevrange", "zcard", "zrange", "get", "smembers"),
        ),
        writes=(),
        reads=("", SHARDS, "*", RUNS),
    ),
    Role(
        name="operator",
        purpose="looks after runs: stops them, puts dead letters back, records, evaluates",
        calls=("requeue", "join", "heartbeat", "leave"),
        looks=("snapshot",),
        commands=(*FUNCTION_READS, *FUNCTION_WRITES, "get", "smembers"),
        writes=(*FUNCTION_KEYS, "stop", "fleet", "evaluations"),
        reads=(SHARDS, "*", RUNS),
    ),
)


def role(name: str) -> Role:
    """The role of a name."""
    return next(one for one in ROLES if one.name == name)


def user_name(role: Role, run: str = "") -> str:
    """The user of a role on all runs, or on one.

    >>> user_name(ROLES[1]), user_name(ROLES[1], "demo")
    ('actor', 'actor-demo')
    """
    return f"{role.name}-{run}" if run else role.name


def rules(role: Role, run: str = "") -> list[str]:
    """The role as arguments of `ACL SETUSER`, on one run or on all. They replace what the user had before.

    >>> rules(role("viewer"), "demo")[5:7] + rules(role("viewer"), "demo")[-2:]
    ['+fcall_ro|slipstream2_snapshot', '+fcall_ro|slipstream2_aged', '%R~{demo}:*', '%R~runs']
    """
    commands = dict.fromkeys((*CONNECTING, *role.commands))
    return [
        *("on", "resetkeys", "resetchannels", "clearselectors", "-@all"),
        *(f"+fcall|{LIBRARY}_{name}" for name in role.calls),
        *(f"+fcall_ro|{LIBRARY}_{name}" for name in role.looks),
        *(f"+{name}" for name in commands),
        *(f"%RW~{_pattern(name, run)}" for name in role.writes if name != SHARDS or run),
        *(f"%R~{_pattern(name, run)}" for name in role.reads if name != SHARDS or run),
    ]


def _pattern(name: str, run: str) -> str:
    tag = re.sub(r"([*?\[\\])", r"\\\1", run) if run else "*"
    if name == RUNS:
        return RUNS
    if name == SHARDS:
        return f"{{{tag}/*}}:*"
    return f"{{{tag}}}:{name}" if name else f"{{{tag}}}"


def new_password() -> str:
    """A password of 192 random bits, fit for a URL."""
    return secrets.token_urlsafe(24)


def acl_lines(passwords: dict[str, str], run: str = "") -> list[str]:
    """Lines of an aclfile, or of a server's configuration: the roles, and `admin`, who may do everything.

    `passwords` are those of the users by name, `admin` among them; the user `default` is off.
    """
    lines = [
        f"user {name} {' '.join(rules(one, run))} >{passwords[name]}"
        for one in ROLES
        if (name := user_name(one, run)) in passwords
    ]
    return [*lines, f"user admin on ~* &* +@all >{passwords['admin']}", "user default off resetpass -@all"]


def create_users(client: Any, run: str = "") -> dict[str, str]:
    """Makes the users of all roles on a server (on a cluster, on every primary) or renews their rights.

    Returns the new users' passwords by name; a user that was there keeps its own. Raises `RedisUnsuitable`
    if `client` is not an administrator's.
    """
    passwords, nodes = {}, primaries(client)
    try:
        for one in ROLES:
            name = user_name(one, run)
            known = all(node.execute_command("ACL", "GETUSER", name) for node in nodes)
            if not known:
                passwords[name] = new_password()
            for node in nodes:
                secret = () if known else ("resetpass", f">{passwords[name]}")
                node.execute_command("ACL", "SETUSER", name, *rules(one, run), *secret)
    except NoPermissionError as error:
        raise RedisUnsuitable(
            f"creating users takes an administrator, such as `default` or `admin`: {error}"
        ) from error
    return passwords


def keep_users(client: Any) -> bool:
    """Has the server write its users to its aclfile; False if it has none: it forgets them at its restart."""
    try:
        for node in primaries(client):
            node.execute_command("ACL", "SAVE")
    except ResponseError as error:
        if "aclfile" in str(error).lower() or "acl file" in str(error).lower():
            return False
        raise
    return True


def with_user(url: str, user: str, password: str) -> str:
    """The URL with another user.

    >>> with_user("redis://:old@host:6379/0?ssl_ca_certs=ca.pem", "actor", "new")
    'redis://actor:new@host:6379/0?ssl_ca_certs=ca.pem'
    """
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    # urlunsplit loses the slashes of unix:///path without an authority; there is one now.
    return urlunsplit(parts._replace(netloc=f"{quote(user)}:{quote(password, safe='')}@{place}"))


def without_user(url: str) -> str:
    """The URL of somebody who has no password.

    >>> without_user("unix://actor:secret@/tmp/redis.sock?db=0"), without_user("redis://:x@host:1")
    ('unix:///tmp/redis.sock?db=0', 'redis://host:1')
    """
    login, at, place = urlsplit(url).netloc.rpartition("@")
    return url.replace(f"{login}{at}{place}", place, 1) if at else url


def table() -> str:
    """The table in Markdown, as docs/security.md has it."""
    lines = [
        f"- All connect: {_listed(CONNECTING)}",
        f"- Functions read by: {_listed(FUNCTION_READS)}",
        f"- Functions write by: {_listed(FUNCTION_WRITES)}",
        f"- Functions' keys: {_listed(_pattern(name, 'run') for name in FUNCTION_KEYS)}",
        "",
    ]
    for one in ROLES:
        plain = [name for name in one.commands if name not in (*FUNCTION_READS, *FUNCTION_WRITES)]
        own = [_pattern(name, "run") for name in one.writes if name not in FUNCTION_KEYS]
        if one.calls:
            commands, written = "those of functions, ", "functions' keys, "
        else:
            plain, commands, written = list(one.commands), "", ""
        lines += [
            f"### {one.name}",
            "",
            f"{one.purpose[0].upper()}{one.purpose[1:]}.",
            "",
            f"- Calls: {_listed(one.calls) or 'nothing'}; only to look: {_listed(one.looks)}",
            f"- Plain commands: {commands}{_listed(plain)}",
            f"- Reads and writes: {written}{_listed(own) or 'nothing'}",
            f"- Only reads: {_listed(_pattern(name, 'run') for name in one.reads) or 'nothing else'}",
            "",
        ]
    return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

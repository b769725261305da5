"""Every key of a run in Redis: the one table. `functions/header.lua` lists the same keys.

All carry the run's name in braces, so that a run lives in one cluster slot. Everything but the
payloads and the prompts is readable with `redis-cli`: hashes of plain integers, or JSON.

    >>> key("demo", "counts")
    '{demo}:counts'
"""

from __future__ import annotations

import msgspec
import xxhash

RUNS = "runs"
"""Set of the names of the runs on a server."""


class Key(msgspec.Struct, frozen=True):
    """A row of the table."""

    name: str
    """Without the run: `counts` is `{run}:counts` on the server."""
    type: str
    """Redis type, such as `hash` or `zset`."""
    owner: str
    """Who writes it: the function library, or a role by plain commands."""
    lifetime: str
    """Until when an entry stays; `run`: as long as the run is on the server."""
    holds: str
    """What lies in it; `a -> b` is field to value."""


KEYS = (
    Key(
        "state", "hash", "functions", "run", "settings, head, version, lineage, the run's clock, how it ended"
    ),
    Key("step", "string", "functions", "run", "the newest committed version"),
    Key("counts", "hash", "functions", "run", "the ledger, by state and reason"),
    Key("staleness", "hash", "functions", "run", "trained groups by staleness in steps"),
    Key("outstanding", "hash", "functions", "run", "groups leased or queued by deadline"),
    Key("leases", "zset", "functions", "while leased", "lease token by expiry, ms on the run's clock"),
    Key("leased", "hash", "functions", "while leased", "lease token -> the lease (JSON)"),
    Key("ready", "zset", "functions", "while queued", "group id by deadline"),
    Key(
        "groups",
        "hash",
        "functions",
        "until covered",
        "group id -> entry, deadline, version_min, bytes (JSON)",
    ),
    Key("manifests", "hash", "functions", "until covered", "step -> its groups and strikes (JSON)"),
    Key(
        "prompts", "list", "functions", "while queued", "position, attempt and last attempt of queued prompts"
    ),
    Key("prompt", "hash", "functions", "until covered", "position -> prompt record (msgpack)"),
    Key("skip", "hash", "functions", "until fed", "positions assigned before the server came back older"),
    Key("versions", "hash", "functions", "run", "committed version -> digest"),
    Key("forks", "list", "functions", "run", "every fork: lineage left, version, reason (JSON)"),
    Key("actors", "hash", "functions", "while joined", "actor -> its record (JSON)"),
    Key(
        "work",
        "hash",
        "functions",
        "while joined",
        "actor -> last admission, open leases, group times (msgpack)",
    ),
    Key("times", "list", "functions", "run", "the last 512 group times, ms"),
    Key("epochs", "hash", "functions", "run", "role -> the epoch that may write"),
    Key("joins", "hash", "functions", "run", "every join by its random bits -> its epoch"),
    Key("holds", "hash", "functions", "while joined", "recorder -> the last step it has (JSON)"),
    Key("places", "list", "functions", "run", "wake-ups for actors waiting for a place"),
    Key("bell", "list", "functions", "run", "wake-up for the learner"),
    Key("trash", "list", "functions", "until swept", "payloads to delete from the shards"),
    Key("dead", "stream", "functions", "32 MiB", "dead letters: group, reason, prompt, payload"),
    Key(
        "stream",
        "stream",
        "actors",
        "until covered",
        "payloads, one entry a group; with shards `{run/s}:stream`",
    ),
    Key("routing", "hash", "actors", "until covered", "group -> chunks of routed experts kept beside it"),
    Key(
        "routed",
        "hash",
        "actors",
        "until covered",
        "with `:<group>`: chunks of its routed experts; with shards `{run/s}:routed:<group>`",
    ),
    Key("config", "string", "learner", "run", "the run's resolved configuration (JSON)"),
    Key("files", "hash", "learner", "run", "model config and tokenizer files by name"),
    Key("curriculum", "hash", "learner", "run", "epoch -> rows of the data it leaves out (JSON)"),
    Key(
        "difficulty",
        "hash",
        "actors",
        "run",
        "`<row>:` asked, solved, failed, reward -> groups, sum of means",
    ),
    Key("environment", "string", "learner", "run", "package versions, instruction set, threads (JSON)"),
    Key("progress", "hash", "learner", "run", "figures of the newest step"),
    Key("mail", "list", "learner", "while joined", "with `:<actor>`: requests to its weight worker (JSON)"),
    Key("scores", "list", "actors", "10 minutes", "with `:<actor>`: its answers to score requests (JSON)"),
    Key("actor_numbers", "string", "launch actors", "run", "how many actor names were given out"),
    Key(
        "fleet",
        "hash",
        "launch actors",
        "run",
        "launcher -> its actors (JSON), and with `:wanted` how many it shall run",
    ),
    Key("evaluations", "hash", "launch eval", "run", "figures of the newest evaluation of a version"),
    Key("stop", "string", "launch stop", "run", "set: no more leases, the learner ends after its step"),
)

_NAMES = frozenset(row.name for row in KEYS)


def key(run: str, name: str) -> str:
    """The full name of a run's key; `name` up to a colon must stand in the table."""
    assert name.partition(":")[0] in _NAMES, name
    return f"{{{run}}}:{name}"


def shard_of(group: str, shards: int) -> int:
    """Which of `shards` payload streams holds a group.

    >>> shard_of("0000-0000000041-01", 1)
    0
    """
    return xxhash.xxh3_64_intdigest(group.encode()) % shards


def shard_key(run: str, shard: int) -> str:
    """The payload stream of a shard, in a cluster slot of its own.

    >>> shard_key("demo", 2)
    '{demo/2}:stream'
    """
    return f"{{{run}/{shard}}}:stream"


def routed_key(run: str, group: str, shards: int) -> str:
    """The hash with the routed experts of a group, beside its payload; `shards` as of the run.

    >>> routed_key("demo", "0000-0000000041-01", 0), routed_key("demo", "0000-0000000041-01", 1)
    ('{demo}:routed:0000-0000000041-01', '{demo/0}:routed:0000-0000000041-01')
    """
    if not shards:
        return key(run, f"routed:{group}")
    return f"{{{run}/{shard_of(group, shards)}}}:routed:{group}"

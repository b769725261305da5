"""Every role does its part under its own user, and nothing else."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from buffer.acl import (
    FUNCTION_KEYS,
    FUNCTION_READS,
    FUNCTION_WRITES,
    ROLES,
    acl_lines,
    create_users,
    keep_users,
    role,
    rules,
    user_name,
    with_user,
)
from buffer.admission import Admit
from buffer.client import AsyncStream, Stream
from buffer.connect import connect
from buffer.errors import RedisUnsuitable, RightMissing, StreamError
from buffer.keys import shard_key
from buffer.ledger import Snapshot, violations
from buffer.local_server import LocalServer, free_port
from buffer.members import JoinActor, JoinRecorder
from buffer.versions import Commit
from tests.contract.harness import Run
from tests.contract.roles import whole_run
from tests.contract.servers import RawServer

NAMES = [one.name for one in ROLES]
OF_FUNCTIONS = {f"+{name}" for name in (*FUNCTION_READS, *FUNCTION_WRITES)}
KEYS_OF_FUNCTIONS = {f"%RW~{{*}}:{key}" if key else "%RW~{*}" for key in FUNCTION_KEYS}
CLUSTER = {"+command", "+cluster|slots"}
"""Rules that only a cluster's client needs: test_cluster.py."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with a user for each role."""
    folder = tmp_path_factory.mktemp("users")
    with LocalServer.start(folder, appendfsync="everysec", users=True) as started:
        yield started


@pytest.fixture(scope="module")
def admin(server: LocalServer) -> Iterator[redis.Redis]:
    """Its administrator."""
    client = connect(server.url)
    yield client
    client.close()


@pytest.fixture
def run(server: LocalServer, run_name: str) -> Iterator[Run]:
    """A started run of the learner's."""
    stream = Stream.connect(server.urls["learner"], run_name)
    stream.load_library()
    yield Run(stream).start()
    stream.close()


def test_every_role_can_do_its_part(server: LocalServer, admin: redis.Redis, run_name: str) -> None:
    admin.execute_command("ACL", "LOG", "RESET")
    ledger = whole_run(server.urls, run_name, admin)
    assert violations(ledger) == []
    assert (ledger.counts.admitted, ledger.counts.trained, ledger.counts.rollbacks) == (14, 4, 1)
    assert admin.acl_log() == [], "somebody tried what its role may not"


def _without(admin: redis.Redis, rule: str, names: list[str]) -> None:
    for name in names:
        admin.execute_command("ACL", "SETUSER", name, *(r for r in rules(role(name)) if r != rule))


def _superfluous(server: LocalServer, admin: redis.Redis, mutants: list[tuple[str, list[str]]]) -> set[str]:
    """Rules without which, taken from these roles, everything still works."""
    found = set()
    for rule, names in mutants:
        _without(admin, rule, names)
        try:
            whole_run(server.urls, f"test-{secrets.token_hex(4)}", admin)
        except StreamError:
            pass
        else:
            found.add(rule)
        finally:
            _without(admin, "", names)
    return found


def test_no_rule_of_functions_is_superfluous(server: LocalServer, admin: redis.Redis) -> None:
    """Taken from all roles that write, each makes somebody's part impossible."""
    writers = [one.name for one in ROLES if one.calls]
    mutants = [(rule, writers) for rule in (*OF_FUNCTIONS, *KEYS_OF_FUNCTIONS)]
    assert _superfluous(server, admin, mutants) == set()


@pytest.mark.parametrize("name", NAMES)
def test_no_role_has_more_than_it_needs(name: str, server: LocalServer, admin: redis.Redis) -> None:
    """Beside what functions need, which every role that writes has in full."""
    shared = CLUSTER | (OF_FUNCTIONS if role(name).calls else set())
    own = [rule for rule in rules(role(name)) if rule[0] in "+%" and rule not in shared | KEYS_OF_FUNCTIONS]
    assert _superfluous(server, admin, [(rule, [name]) for rule in own]) == set()


FORBIDDEN = [
    ("EVAL", "return 1", 0),
    ("SCRIPT", "LOAD", "return 1"),
    ("KEYS", "*"),
    ("SCAN", 0),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "GET", "requirepass"),
    ("CONFIG", "SET", "appendfsync", "no"),
    ("ACL", "LIST"),
    ("FUNCTION", "DELETE", "slipstream2"),
    ("FUNCTION", "FLUSH"),
    ("CLIENT", "LIST"),
    ("SHUTDOWN",),
    ("MONITOR",),
    ("SWAPDB", 0, 1),
    ("RENAME", "a", "b"),
    ("PUBLISH", "channel", "x"),
]


@pytest.mark.parametrize("name", NAMES)
def test_other_commands_are_refused_by_name(name: str, server: LocalServer, run: Run) -> None:
    stream = Stream.connect(server.urls[name], run.stream.run)
    for command in FORBIDDEN:
        with pytest.raises(RightMissing, match=f"^Redis user {name} may not {command[0]}") as caught:
            stream.redis.execute_command(*command)
        assert "launch redis-users" in str(caught.value)
    stream.close()


@pytest.mark.parametrize("name", NAMES)
def test_other_functions_are_refused_by_name(name: str, server: LocalServer, run: Run) -> None:
    every = {function for one in ROLES for function in (*one.calls, *one.looks)}
    stream, may = Stream.connect(server.urls[name], run.stream.run), {*role(name).calls, *role(name).looks}
    before = run.snapshot()
    for function in sorted(every - may):
        said = rf"^Redis user {name} may not FCALL slipstream2_{function} on \{{{run.stream.run}\}}"
        with pytest.raises(RightMissing, match=said):
            stream.redis.execute_command("FCALL", f"slipstream2_{function}", 1, f"{{{run.stream.run}}}")
    assert run.snapshot() == before
    stream.close()


@pytest.mark.parametrize(
    ("name", "command", "key"),
    [
        ("actor", ("SET",), "config"),
        ("actor", ("HSET",), "files"),
        ("actor", ("SET",), "stop"),
        ("actor", ("HSET",), "progress"),
        ("actor", ("SADD",), "runs"),
        ("operator", ("SET",), "config"),
        ("operator", ("RPUSH",), "mail:a"),
        ("operator", ("SADD",), "runs"),
        ("viewer", ("SET",), "stop"),
        ("viewer", ("HSET",), "state"),
        ("learner", ("RPUSH",), "other"),
        ("learner", ("SET",), "actor_numbers"),
    ],
)
def test_what_a_role_only_reads_it_cannot_write(
    name: str, command: tuple[str], key: str, server: LocalServer, run: Run
) -> None:
    client = connect(server.urls[name])
    full = key if key == "runs" else f"{{{run.stream.run}}}:{key}"
    words = ("field", "value") if command == ("HSET",) else ("value",)
    said = f"^Redis user {name} may not {command[0]} {full}".replace("{", r"\{").replace("}", r"\}")
    with pytest.raises(RightMissing, match=said):
        client.execute_command(*command, full, *words)
    client.close()


def test_nobody_joins_in_another_role(server: LocalServer, run: Run) -> None:
    name = run.stream.run
    actor, operator = (Stream.connect(server.urls[who], name) for who in ("actor", "operator"))
    before = run.snapshot()
    with pytest.raises(RedisUnsuitable, match=f"may not join run {{{name}}} as learner; use the user"):
        Run(actor).join_learner()
    with pytest.raises(RedisUnsuitable, match="as recorder"):
        actor.call(JoinRecorder("bits", "r"))
    with pytest.raises(RedisUnsuitable, match="as actor"):
        operator.call(JoinActor("bits", "a", "host"))
    with pytest.raises(RedisUnsuitable, match="as learner"):
        Run(operator).join_learner()
    assert run.snapshot() == before
    actor.close()
    operator.close()


@pytest.fixture
def tenants(server: LocalServer, admin: redis.Redis, run: Run) -> Iterator[dict[str, str]]:
    """URLs of users of one run, by role; another run is there, too."""
    created = create_users(admin, run.stream.run)
    yield {one.name: with_user(server.url, name, created[name]) for one in ROLES
           for name in [user_name(one, run.stream.run)]}  # fmt: skip
    admin.execute_command("ACL", "DELUSER", *created)


def test_users_of_one_run_can_drive_it(server: LocalServer, admin: redis.Redis, run_name: str) -> None:
    created = create_users(admin, run_name)
    urls = {
        one.name: with_user(server.url, user, created[user])
        for one in ROLES
        for user in [user_name(one, run_name)]
    }
    assert violations(whole_run(urls, run_name, admin)) == []
    admin.execute_command("ACL", "DELUSER", *created)


@pytest.mark.parametrize("name", NAMES)
def test_another_run_is_out_of_reach(
    name: str, tenants: dict[str, str], server: LocalServer, admin: redis.Redis, run: Run
) -> None:
    other = Run(Stream.connect(server.url, f"{run.stream.run}x")).start("a")
    user = user_name(role(name), run.stream.run)
    stream, before = Stream.connect(tenants[name], other.stream.run), other.keys()
    for function in (*role(name).calls, *role(name).looks):
        verb = "FCALL_RO" if function in role(name).looks else "FCALL"
        said = rf"^Redis user {user} may not {verb} slipstream2_{function} on \{{{other.stream.run}\}}"
        with pytest.raises(RightMissing, match=said):
            stream.redis.execute_command(verb, f"slipstream2_{function}", 1, f"{{{other.stream.run}}}")
    shard = shard_key(other.stream.run, 0)
    for command in [
        ("XADD", shard, "*", "g", "x"),
        ("XRANGE", shard, "-", "+"),
        ("HGETALL", stream.key("state")),
    ]:
        with pytest.raises(RightMissing, match=rf"^Redis user {user} may not {command[0]}"):
            stream.redis.execute_command(*command)
    assert other.keys() == before
    stream.close()
    other.stream.close()


def test_a_pipeline_and_a_function_name_the_user_too(
    server: LocalServer, admin: redis.Redis, run: Run
) -> None:
    actor = Run(Stream.connect(server.urls["actor"], run.stream.run))
    actor.epochs = run.epochs
    actor.join_actor("a")
    actor.applied("a", 0)
    lease = actor.admit("a")
    for missing in ("+fcall|slipstream2_publish", "+xadd", "+zadd"):
        _without(admin, missing, ["actor"])
        with pytest.raises(
            RightMissing, match=r"Redis user actor may not.*(fcall|xadd|zadd|executing the script)"
        ):
            actor.publish(lease, "a")
        _without(admin, "", ["actor"])
    assert actor.publish(lease, "a").status == "ok"
    assert run.snapshot().counts.conserved
    actor.stream.close()


async def test_a_wrong_password_is_named_at_once(server: LocalServer, admin: redis.Redis, run: Run) -> None:
    wrong = with_user(server.url, "actor", "hunter2")
    for attempt in (Stream.connect, AsyncStream.connect):
        with pytest.raises(RedisUnsuitable, match=r"refuses us: .*put user:password of a role") as caught:
            attempt(wrong, run.stream.run)
        assert "hunter2" not in str(caught.value)
        with pytest.raises(RedisUnsuitable, match="refuses us"):
            attempt(with_user(server.url, "nobody", "x"), run.stream.run)
    users = create_users(admin, run.stream.run)
    url = with_user(server.url, f"viewer-{run.stream.run}", users[f"viewer-{run.stream.run}"])
    viewer, awaiting = Stream.connect(url, run.stream.run), AsyncStream.connect(url, run.stream.run)
    viewer.call(Snapshot())
    await awaiting.call(Snapshot())
    admin.execute_command("ACL", "DELUSER", *users)  # disconnects them
    for _ in range(2):
        with pytest.raises(RedisUnsuitable, match="refuses us"):
            viewer.call(Snapshot())
        with pytest.raises(RedisUnsuitable, match="refuses us"):
            await awaiting.call(Snapshot())
    viewer.close()
    await awaiting.close()


async def test_the_async_client_names_what_is_missing(server: LocalServer, run: Run) -> None:
    actor = AsyncStream.connect(server.urls["actor"], run.stream.run)
    with pytest.raises(RightMissing, match=r"^Redis user actor may not FCALL slipstream2_commit on"):
        await actor.call(Commit("1:x", 1, "digest"))
    with pytest.raises(RightMissing, match=r"^Redis user actor may not CONFIG GET"):
        await actor.redis.config_get("bind")
    viewer = AsyncStream.connect(server.urls["viewer"], run.stream.run)
    with pytest.raises(RightMissing, match=r"^Redis user viewer may not FCALL slipstream2_admit on"):
        await viewer.call(Admit("a", "1:x", 1, "bits"))
    await actor.close()
    await viewer.close()


def test_roles_work_over_the_unix_socket(server: LocalServer, run: Run) -> None:
    password = server.urls["viewer"].split(":")[2].partition("@")[0]
    url = with_user(server.socket_url, "viewer", password)
    assert url.startswith("unix://viewer:")
    stream = Stream.connect(url, run.stream.run)
    assert stream.call(Snapshot()).number("version") == 0
    with pytest.raises(RightMissing, match="user viewer may not SET"):
        stream.redis.set(stream.key("stop"), "1")
    stream.close()


def test_the_default_user_is_off(server: LocalServer) -> None:
    with pytest.raises(RedisUnsuitable, match="refuses us"):
        connect(server.url.replace("admin:", ":").replace(server.url.split(":")[2].split("@")[0], "x"))
    with pytest.raises(RedisUnsuitable, match="refuses us"):
        connect(f"redis://127.0.0.1:{server.url.rpartition(':')[2]}")


def test_creating_users_again_keeps_passwords_and_renews_rights(
    server: LocalServer, admin: redis.Redis, run_name: str
) -> None:
    first = create_users(admin, run_name)
    assert sorted(first) == sorted(f"{name}-{run_name}" for name in NAMES)
    assert len(set(first.values())) == len(ROLES)
    before = admin.acl_getuser(f"actor-{run_name}")
    admin.execute_command("ACL", "SETUSER", f"actor-{run_name}", "+flushall", "~*", "off", "-fcall")
    assert create_users(admin, run_name) == {}
    assert admin.acl_getuser(f"actor-{run_name}") == before
    connect(with_user(server.url, f"actor-{run_name}", first[f"actor-{run_name}"])).close()
    admin.execute_command("ACL", "DELUSER", *first)


def test_only_an_administrator_creates_users(server: LocalServer) -> None:
    client = connect(server.urls["operator"])
    with pytest.raises(RedisUnsuitable, match="creating users takes an administrator"):
        create_users(client)
    client.close()


def test_users_outlive_the_server_if_it_has_an_aclfile(
    server: LocalServer, admin: redis.Redis, tmp_path: Path
) -> None:
    assert not keep_users(admin), "its users stand in its configuration"
    passwords = {"admin": "a" * 16, **{name: f"{name}-password" for name in NAMES}}
    file = tmp_path / "users.acl"
    file.write_text("\n".join([*acl_lines(passwords), ""]))
    settings = {"port": free_port(), "aclfile": file}
    with RawServer(tmp_path / "redis", settings) as kept:
        url = f"redis://127.0.0.1:{kept.port}"
        client = connect(with_user(url, "admin", "a" * 16))
        created = create_users(client, "demo")
        assert keep_users(client)
        client.close()
        kept.kill()
        kept.start()
        for user, password in [*created.items(), *passwords.items()]:
            connect(with_user(url, user, password)).close()
        with pytest.raises(RedisUnsuitable):
            connect(url)


def test_a_name_with_wildcards_stays_one_run(server: LocalServer, admin: redis.Redis, run_name: str) -> None:
    created = create_users(admin, f"{run_name}*[x]?")
    user = f"learner-{run_name}*[x]?"
    url = with_user(server.url, user, created[user])
    own = Stream.connect(url, f"{run_name}*[x]?")
    own.load_library()
    assert Run(own).start().snapshot().number("version") == 0
    with pytest.raises(RightMissing, match=r"may not FCALL slipstream2_join on"):
        Run(Stream.connect(url, f"{run_name}yx?")).start()
    admin.execute_command("ACL", "DELUSER", *created)
    own.close()

"""The table of roles, the functions and the page say the same."""

from __future__ import annotations

import re
from pathlib import Path

from buffer.acl import FUNCTION_KEYS, FUNCTION_READS, FUNCTION_WRITES, ROLES, rules, table
from buffer.client import LIBRARY, library_source
from buffer.keys import KEYS

ROOT = Path(__file__).parents[3]


def test_the_commands_of_functions_are_those_of_the_library() -> None:
    source = library_source()
    reads = set(re.findall(r"\bcall\('([A-Z]+)'", source)) - {"HSET", "HDEL", "XDEL"}  # written at once
    writes = set(re.findall(r"\bwrite\(C, '([A-Z]+)'", source)) | set(re.findall(r"\{ '([A-Z]+)'", source))
    assert {name.upper() for name in FUNCTION_READS} == reads
    assert {name.upper() for name in FUNCTION_WRITES} == writes


def test_the_keys_of_functions_are_those_of_the_table() -> None:
    assert {*FUNCTION_KEYS} == {row.name for row in KEYS if row.owner == "functions"} | {"", "stream"}


def test_the_functions_of_roles_are_those_of_the_library() -> None:
    registered = set(re.findall(r"^register\('(\w+)'", library_source(), re.MULTILINE))
    assert {name for role in ROLES for name in (*role.calls, *role.looks)} == registered


def test_a_role_that_writes_can_finish_what_another_began() -> None:
    writers = [role for role in ROLES if role.calls]
    assert [role.name for role in writers] == ["learner", "actor", "operator"]
    for role in writers:
        assert {*FUNCTION_READS, *FUNCTION_WRITES} <= {*role.commands}
        assert {*FUNCTION_KEYS} <= {*role.writes}


def test_a_role_that_looks_gets_nothing_that_writes() -> None:
    viewer = next(role for role in ROLES if role.name == "viewer")
    assert not {*FUNCTION_WRITES} & {*viewer.commands}
    assert not [rule for rule in rules(viewer) if rule.startswith((f"+fcall|{LIBRARY}", "%RW", "~"))]


def test_nobody_gets_a_whole_category_or_all_keys() -> None:
    for role in ROLES:
        for rule in rules(role):
            assert rule not in (
                "allkeys",
                "allcommands",
                "~*",
                "%RW~*",
                "%R~*",
                "+fcall",
                "+fcall_ro",
                "nopass",
            )
            assert not rule.startswith("+@")


def test_the_page_shows_the_table() -> None:
    assert (ROOT / "docs/security.md").read_text().endswith(table())

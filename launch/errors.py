"""Errors of the command line."""

from __future__ import annotations


class LaunchError(Exception):
    """Bad input or a process that failed; printed as one line, exit code 2."""

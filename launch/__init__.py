"""The command line: composes configuration, starts and watches processes, summarises runs."""

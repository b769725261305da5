"""Faults the stream must survive, made on purpose: real processes, real Redis, scripted model.

`make test` runs the quick counts, `make faults` the full ones (marker `faults`). docs/faults.md says what
each row checks and what the full counts gave.

    policy.py       the model: every token, weight and digest a pure function, so that anybody can re-score
    learner.py      a learner process; it restores, replays, trains, commits, checkpoints, logs each event
    actor.py        an actor process; it leases, generates, publishes, and bears a Redis that goes and comes
    real.py         trials of the real learner on Megatron-Core, with the scripted actors
    real_learner.py it, with log and points put around its calls
    writer.py       likewise, of the process that writes its checkpoints
    weights.py      the real offers, agents and transports between scripted processes
    synchronous.py  what it must equal at eta = 0
    checkpoints.py  folders that are complete once they have their name
    points.py       SLIPSTREAM_FAULT=role:point:n[:kill|stop], logs of one JSON line an event, exit codes
    poison.py       ten kinds of records that must not be trained
    spawner.py      starts the processes by forking one that has imported everything
    proxy.py        loses replies, delays, swallows, cuts
    server.py       a Redis to kill, stop, wipe and give an older file, on one port
    trial.py        a run and its processes; `finish` checks I1 to I6
    invariants.py   I1 to I6 from Redis and the logs

After every row, `Trial.finish` or `check` looks for anything that breaks

    I1  the ledger's conservation and every number in it (`buffer.ledger.violations` of a full snapshot);
        under `always` every acknowledged publish is trained, assigned, queued or struck
    I2  a group in two trained steps; a step assigned or trained differently the second time (groups, weights)
    I3  a trained group older than eta, by the groups' own versions in the learners' logs, and by the ledger
    I4  a version tag that is not the committed one; a token, log-probability or reward that is another when
        scored again under the digest it names; a version committed with two digests
    I5  no new step within the time of the row (the rate itself is not compared: machines are shared)
    I6  an exit code other than the expected one, a last line without a reason, anything on standard error

Rows 1, 2, 12, 23, 24: test_actors.py. Rows 3, 4, 5, 6, 15: test_learner.py. Rows 7 to 10: test_server.py.
Row 11: test_network.py. Rows 13, 16, 17, 25: test_membership.py, test_weights.py. Rows 19, 20:
test_limits.py.
All roles at random: test_mass.py. Rows 3 to 6 and 18 with the real learner: test_real_learner.py.
"""

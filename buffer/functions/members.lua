-- Who takes part: join, heartbeat, applied, leave.

local COVER_MAX = 64 -- steps covered in one call, so that no call is long
local SETTINGS = { 'batch', 'eta', 'max_steps', 'group_size', 'lease_ms', 'attempts_max', 'policy', 'cap',
  'lease_max_ms', 'uncovered_max', 'bytes_limit', 'dynamic', 'schema', 'shards' }
local ZERO = { 'lineage', 'head', 'tail', 'clock', 'lease_number', 'checkpoint', 'bytes_held', 'bytes_peak', 'published',
  'p99_ms', 'step_ms', 'fleet_ms', 'live', 'unsafe_since', 'unsafe_ms', 'assigned_at', 'probes', 'dead_bytes' }

local function read_settings(args, from)
  local wanted = {}
  for i, name in ipairs(SETTINGS) do
    local value = args[from + i - 1]
    wanted[name] = STRINGS[name] and text(value, name) or integer(value, name)
  end
  return wanted
end

-- The epoch of a join: a repeat, known by its random bits, gets the epoch of the first one.
local function next_epoch(C, role, random)
  local known = call('HGET', C.key.joins, role .. ':' .. random)
  if known then return known, true end
  local epoch = (number_of(call('HGET', C.key.epochs, role) or '0') + 1) .. ':' .. random
  write(C, 'HSET', C.key.epochs, role, epoch)
  write(C, 'HSET', C.key.joins, role .. ':' .. random, epoch)
  return epoch, false
end

local function joined(C, epoch)
  local S = C.S
  return cmsgpack.pack({ epoch, S.nonce, S.lineage, S.head, S.version, S.tail, S.checkpoint, S.covered, S.data_end })
end

-- join learner <random> <nonce> <setting>...: creates the run if there is none, and goes on with one that was ended.
local function join_learner(run, args)
  local random, nonce, wanted = text(args[2], 'random'), text(args[3], 'nonce'), read_settings(args, 4)
  local created = call('EXISTS', run[1] .. ':state') == 0
  local C = created and open(run) or begin(run)
  if created then
    local time = call('TIME')
    C.S = wanted
    for _, name in ipairs(ZERO) do C.S[name] = 0 end
    C.S.nonce, C.S.ended, C.S.version, C.S.data_end, C.S.wanted, C.S.covered = nonce, '', -1, -1, -1, -1
    C.S.last = time[1] * 1000 + math.floor(time[2] / 1000)
    for name in pairs(C.S) do C.dirty[name] = true end
  end
  for _, name in ipairs(SETTINGS) do
    if C.S[name] ~= wanted[name] then
      fail('SETTINGS', name .. ': this run has ' .. C.S[name] .. ', the learner asks for ' .. wanted[name])
    end
  end
  local epoch, again = next_epoch(C, 'learner', random)
  if not again then
    write(C, 'DEL', C.key.stop)
    if C.S.ended ~= '' then set(C, 'ended', '') end
  end
  finish(C)
  return joined(C, epoch)
end

-- join actor <random> <name> <host> <schema>: it serves no version until `applied`; an older epoch of the name is
-- fenced, and its leases are released.
local function join_actor(run, args)
  local random, name, host = text(args[2], 'random'), text(args[3], 'name'), text(args[4], 'host')
  local C = begin(run)
  if integer(args[5], 'schema') ~= C.S.schema then
    fail('SCHEMA', 'actor ' .. name .. ' writes records of schema version ' .. args[5] .. ', this run reads ' .. C.S.schema)
  end
  local epoch, again = next_epoch(C, 'actor:' .. name, random)
  if not again then
    local work = work_of(C, name)
    for _, token in ipairs(newest_first(tokens_of(work))) do
      local lease = lease_of(C, token)
      if lease then close_lease(C, token, lease, 'released') end
    end
    C.work[name] = { request = -1, held = {}, times = {}, probe = -60000 }
    save_work(C, name)
    write(C, 'HSET', C.key.actors, name, cjson.encode({
      epoch = epoch, version = -1, state = 'starting', beat = C.S.clock, host = host }))
  end
  finish(C)
  return joined(C, epoch)
end

-- Deletes the payloads, group records and prompts of steps that no checkpoint and no recorder asks for any more,
-- a few steps a call. `own` is a recorder that has now recorded up to `step`.
local function cover(C, own, step)
  local S, covered = C.S, C.S.wanted
  for name, hold in pairs(map_of(call('HGETALL', C.key.holds))) do
    hold = cjson.decode(hold)
    if name == own then covered = math.min(covered, step)
    elseif S.clock - hold.beat <= 6 * S.lease_ms then covered = math.min(covered, hold.step) end
  end
  covered = math.min(covered, S.covered + COVER_MAX)
  for step = S.covered + 1, covered do
    local manifest = call('HGET', C.key.manifests, step)
    for _, row in ipairs(manifest and cjson.decode(manifest).rows or {}) do
      local group = group_row(C, row[1])
      if group then
        write(C, 'HDEL', C.key.prompt, group.position)
        write(C, 'HDEL', C.key.groups, row[1])
        delete_payload(C, group)
      end
    end
    write(C, 'HDEL', C.key.manifests, step)
  end
  if covered > S.covered then set(C, 'covered', covered) end
end

-- join recorder <random> <name>: payloads that are still there stay until it has them.
local function join_recorder(run, args)
  local C, random, name = begin(run), text(args[2], 'random'), text(args[3], 'name')
  local epoch, again = next_epoch(C, 'recorder:' .. name, random)
  if not again then
    write(C, 'HSET', C.key.holds, name, cjson.encode({ epoch = epoch, step = C.S.covered, beat = C.S.clock }))
  end
  finish(C)
  return joined(C, epoch)
end

-- A key that only a user of this role may write: functions cannot be told apart by their arguments in an ACL.
local OWN = { learner = 'config', actor = 'scores:', recorder = 'stop' }

-- Answers {epoch, nonce, lineage, head, version, tail, checkpoint, covered, data_end}.
local function join(run, args)
  local role = args[1]
  if not OWN[role] then fail('ARGUMENT', 'role: got ' .. tostring(role) .. ', expected learner, actor or recorder') end
  if not redis.acl_check_cmd('DEL', run[1] .. ':' .. OWN[role]) then
    fail('RIGHT', 'this Redis user may not join run ' .. run[1] .. ' as ' .. role .. '; use the user of that role')
  end
  if role == 'learner' then return join_learner(run, args) end
  if role == 'actor' then return join_actor(run, args) end
  return join_recorder(run, args)
end

-- heartbeat recorder <name> <epoch> <step>: it has all steps up to this one. Answers {head, version, covered, ended}.
local function heartbeat_recorder(C, name, epoch, step)
  check_epoch(C, 'recorder:' .. name, epoch)
  tick(C)
  write(C, 'HSET', C.key.holds, name, cjson.encode({ epoch = epoch, step = step, beat = C.S.clock }))
  cover(C, name, step)
  finish(C)
  return cmsgpack.pack({ C.S.head, C.S.version, C.S.covered, C.S.ended })
end

-- heartbeat learner <epoch>: time passes and leases expire also while it trains or waits. Answers {head, version,
-- covered, ended}.
local function heartbeat_learner(C, epoch)
  check_epoch(C, 'learner', epoch)
  tick(C)
  finish(C)
  return cmsgpack.pack({ C.S.head, C.S.version, C.S.covered, C.S.ended })
end

-- heartbeat actor <name> <epoch> <state> <stats JSON> <token>...: renews the leases it lists and no others.
-- Answers {head, version, over, ended, {tokens that are no longer leases}}.
local function heartbeat(run, args)
  local C, name = begin(run), text(args[2], 'name')
  if args[1] == 'learner' then return heartbeat_learner(C, args[2]) end
  if args[1] == 'recorder' then return heartbeat_recorder(C, name, args[3], integer(args[4], 'step')) end
  local S = C.S
  check_epoch(C, 'actor:' .. name, args[3])
  local actor = actor_record(C, name)
  local valid, stats = pcall(cjson.decode, args[5])
  -- An array, or a NaN that cjson reads but cannot write, would break the actor's record for every reader.
  if not valid or not args[5]:match('^%s*{') or not pcall(cjson.encode, stats) then
    fail('ARGUMENT', 'stats: got ' .. tostring(args[5]) .. ', expected a JSON object')
  end
  tick(C)
  local lost, longest = {}, S.lease_max_ms
  if longest == 0 and S.p99_ms > 0 then longest = math.max(10 * S.p99_ms, 6 * S.lease_ms) end
  for i = 6, #args do
    local lease = lease_of(C, args[i])
    if lease and lease.actor == name then
      local expiry = S.clock + S.lease_ms
      if longest > 0 then expiry = math.min(expiry, lease.born + longest) end
      write(C, 'ZADD', C.key.leases, expiry, args[i])
      if lease.suspect then
        lease.suspect = nil
        write(C, 'HSET', C.key.leased, args[i], cjson.encode(lease))
      end
    else
      lost[#lost + 1] = args[i]
    end
  end
  actor.state, actor.stats, actor.beat = args[4], stats, S.clock
  write(C, 'HSET', C.key.actors, name, cjson.encode(actor))
  local ends = over(C)
  finish(C)
  return cmsgpack.pack({ S.head, S.version, ends, S.ended, lost })
end

-- applied <actor> <epoch> <version> <digest>: the actor's engine serves this committed version.
-- Answers {version, digest} of what it now counts as serving; an engine's version never goes back under one epoch.
local function applied(run, args)
  local C, name, version = begin(run), text(args[1], 'actor'), integer(args[3], 'version')
  check_epoch(C, 'actor:' .. name, args[2])
  local actor = actor_record(C, name)
  local digest = call('HGET', C.key.versions, version)
  if digest ~= args[4] then
    fail('DIGEST', 'version ' .. version .. ': got digest ' .. tostring(args[4]) .. ', committed is ' .. tostring(digest or 'none'))
  end
  if version <= actor.version then
    digest = call('HGET', C.key.versions, actor.version)
  else
    actor.version = version
    write(C, 'HSET', C.key.actors, name, cjson.encode(actor))
    C.places = 1
  end
  finish(C)
  return cmsgpack.pack({ actor.version, digest })
end

-- leave actor <name> <epoch>: its leases are released and it is gone.
-- leave recorder <name> <epoch>: nothing is kept for it any more.
-- leave learner <reason> <epoch>: the run is ended for that reason; leases left over are released.
-- Answers {released}.
local function leave(run, args)
  local C, name, released = begin(run), text(args[2], 'name'), 0
  local role = args[1] == 'learner' and 'learner' or args[1] .. ':' .. name
  check_epoch(C, role, args[3])
  local held = args[1] == 'learner' and call('HKEYS', C.key.leased) or {}
  if args[1] == 'learner' then
    set(C, 'ended', name)
  elseif args[1] == 'actor' then
    held = tokens_of(work_of(C, name))
    write(C, 'HDEL', C.key.actors, name)
  else
    write(C, 'HDEL', C.key.holds, name)
    cover(C, name, math.huge)
  end
  newest_first(held)
  for _, token in ipairs(held) do
    local lease = lease_of(C, token)
    if lease then
      close_lease(C, token, lease, 'released')
      released = released + 1
    end
  end
  if args[1] == 'actor' then
    C.worked = C.worked or {}
    C.worked[name] = nil
    write(C, 'HDEL', C.key.work, name)
  end
  finish(C)
  return cmsgpack.pack({ released })
end

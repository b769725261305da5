-- What a step leaves behind, and how to take steps back: commit, fork.

local FLEET = 64 -- actors looked at for the usual pace

-- The median of the live actors' usual group times, and how many are live: what makes an actor slow.
local function note_fleet(C)
  local S, paces, live = C.S, {}, 0
  local flat = call('HRANDFIELD', C.key.actors, FLEET, 'WITHVALUES')
  for i = 1, #flat, 2 do
    local actor = cjson.decode(flat[i + 1])
    if S.clock - actor.beat <= S.lease_ms and actor.version >= 0 then
      live = live + 1
      local work = work_of(C, flat[i])
      if #work.times > 0 then paces[#paces + 1] = usual(work.times) end
    end
  end
  table.sort(paces)
  set(C, 'live', live)
  set(C, 'fleet_ms', math.floor((paces[math.ceil(#paces / 2)] or 0) + 0.5))
end

local function note_trained(C, manifest, step)
  local staleness, trained = {}, 0
  for _, row in ipairs(manifest.rows) do
    if not manifest.strikes[row[1]] then
      staleness[step - row[3]] = (staleness[step - row[3]] or 0) + 1
      trained = trained + 1
    end
  end
  for steps, groups in pairs(staleness) do write(C, 'HINCRBY', C.key.staleness, steps, groups) end
  return trained
end

-- commit version <epoch> <version> <digest> <covered> <struck>: step version-1 is trained and its weights have this
-- digest. `covered` is the last step that no restore can ask for again, -1 for none; `struck` how many strikes the
-- step has, -1 if not known: a server that came back older may have lost one. Of a version that is committed already,
-- as in a replay, nothing changes. Answers {version, the digest that counts}.
local function commit_version(C, version, digest, covered, struck)
  local S, known = C.S, call('HGET', C.key.versions, version)
  if known then return cmsgpack.pack({ S.version, known }) end
  if version > S.version + 1 or version > S.head then
    fail('BEHIND', 'got version ' .. version .. ', the next to commit is ' .. (S.version + 1) ..
      ' and the next step to assign ' .. S.head)
  end
  if version <= S.version then fail('STEP', 'version ' .. version .. ' is of another lineage') end
  if covered >= version then fail('ARGUMENT', 'covered: got ' .. covered .. ', beyond the step trained') end
  local manifest = version > 0 and cjson.decode(call('HGET', C.key.manifests, version - 1)) or { rows = {}, strikes = {} }
  local known_strikes = 0
  for _ in pairs(manifest.strikes) do known_strikes = known_strikes + 1 end
  if struck >= 0 and struck ~= known_strikes then
    fail('BEHIND', 'step ' .. (version - 1) .. ' was trained without ' .. struck .. ' groups, ' .. known_strikes .. ' are struck')
  end
  local trained = note_trained(C, manifest, version - 1)
  count(C, 'assigned', 0 - trained) -- -0 is no integer to Redis 7.0
  count(C, 'trained', trained)
  write(C, 'HSET', C.key.versions, version, digest)
  set(C, 'version', version)
  write(C, 'SET', C.key.step, version)
  set(C, 'wanted', math.max(S.wanted, covered))
  cover(C)
  note_fleet(C)
  finish(C)
  return cmsgpack.pack({ version, digest })
end

-- commit checkpoint <epoch> <version> <digest> <oldest>: a checkpoint of this version is complete and the latest, and
-- the oldest one kept is of version `oldest`; payloads of steps below that are deleted. Answers {version, digest}.
local function commit_checkpoint(C, version, digest, oldest)
  local known = call('HGET', C.key.versions, version)
  if version > C.S.version then fail('BEHIND', 'checkpoint of version ' .. version .. ', the newest committed is ' .. C.S.version) end
  if known ~= digest then
    fail('DIGEST', 'checkpoint of version ' .. version .. ': got digest ' .. digest .. ', committed is ' .. tostring(known or 'none'))
  end
  if oldest > version then fail('ARGUMENT', 'oldest: got ' .. oldest .. ', newer than the checkpoint ' .. version) end
  set(C, 'checkpoint', math.max(C.S.checkpoint, version))
  set(C, 'wanted', math.max(C.S.wanted, oldest - 1))
  cover(C)
  finish(C)
  return cmsgpack.pack({ version, digest })
end

local function commit(run, args)
  local C, kind = begin(run), args[1]
  check_epoch(C, 'learner', args[2])
  local version, digest, third = integer(args[3], 'version'), text(args[4], 'digest'), integer(args[5], 'covered')
  if kind == 'version' then return commit_version(C, version, digest, third, integer(args[6], 'struck')) end
  if kind == 'checkpoint' then return commit_checkpoint(C, version, digest, third) end
  fail('ARGUMENT', 'kind: got ' .. tostring(kind) .. ', expected version or checkpoint')
end

-- Drops every lease and queued group, for a reason. Their prompts return, the oldest to the head.
local function abandon_outstanding(C, reason)
  for _, token in ipairs(newest_first(call('HKEYS', C.key.leased))) do
    local lease = lease_of(C, token)
    if lease then close_lease(C, token, lease, reason) end
  end
  local ready = call('ZRANGE', C.key.ready, 0, -1)
  for i = #ready, 1, -1 do
    local row = group_row(C, ready[i])
    drop_queued(C, row, reason)
    queue_again(C, C.back, row, row.attempt)
  end
end

-- Undoes the steps from `from` on: their groups drop as `lineage`, and their prompts return.
local function undo_steps(C, from)
  local S = C.S
  for step = S.head - 1, from, -1 do
    local packed = call('HGET', C.key.manifests, step)
    local manifest = packed and cjson.decode(packed) or { rows = {}, strikes = {} }
    for i = #manifest.rows, 1, -1 do
      local one = manifest.rows[i]
      if not manifest.strikes[one[1]] then
        count(C, step < S.version and 'trained' or 'assigned', -1)
        count(C, 'dropped:lineage', 1)
        if step < S.version then write(C, 'HINCRBY', C.key.staleness, step - one[3], -1) end
      end
      local row = group_row(C, one[1])
      if row then
        write(C, 'HDEL', C.key.groups, one[1])
        delete_payload(C, row)
        queue_again(C, C.back, row, row.attempt)
      end
    end
    write(C, 'HDEL', C.key.manifests, step)
  end
  for version = from + 1, S.version do write(C, 'HDEL', C.key.versions, version) end
end

-- fork <epoch> <lineage> <at> <reason> <setting>...: a new lineage, from the weights of version `at` of this one. Steps
-- from `at` on are undone, what is outstanding drops as `lineage`, prompts return; settings may change.
-- Answers {lineage, head, version, tail}.
local function fork(run, args)
  local C = begin(run)
  local S, lineage, at, reason = C.S, integer(args[2], 'lineage'), integer(args[3], 'at'), text(args[4], 'reason')
  check_epoch(C, 'learner', args[1])
  local function answer() return cmsgpack.pack({ S.lineage, S.head, S.version, S.tail }) end
  if lineage + 1 == S.lineage and at == S.head then return answer() end
  if lineage ~= S.lineage then fail('STEP', 'lineage: got ' .. lineage .. ', the run is at ' .. S.lineage) end
  if at < 0 or at > S.version then fail('STEP', 'at: got version ' .. at .. ', the newest committed is ' .. S.version) end
  local wanted = read_settings(args, 5)
  abandon_outstanding(C, 'lineage')
  undo_steps(C, at)
  write(C, 'RPUSH', C.key.forks, cjson.encode({
    lineage = S.lineage, at = at, head = S.head, version = S.version, reason = reason }))
  for name, value in pairs(wanted) do set(C, name, value) end
  for name, value in pairs({ lineage = lineage + 1, head = at, version = at, probes = 0, step_ms = 0, assigned_at = 0,
      unsafe_since = 0, unsafe_ms = 0, checkpoint = math.min(S.checkpoint, at), wanted = math.min(S.wanted, at - 1),
      covered = math.min(S.covered, at - 1) }) do
    set(C, name, value)
  end
  write(C, 'SET', C.key.step, at)
  for name, packed in pairs(map_of(call('HGETALL', C.key.actors))) do
    local actor = cjson.decode(packed)
    if actor.version > at then
      actor.version = -1
      write(C, 'HSET', C.key.actors, name, cjson.encode(actor))
    end
  end
  finish(C)
  return answer()
end

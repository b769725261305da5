#!lua name=slipstream1
--
-- The replay stream's control plane. Every function is atomic, checks everything before it writes,
-- and may be called again with the same arguments: a repeat returns the first answer. None blocks.
-- The rules and why they hold: docs/staleness.md. Callers: admission.py, ledger.py, prompts.py, stream.py.
--
-- KEYS[1] is `{run}`, the run's name in braces: all keys of a run share one cluster slot.
--
-- runs                  set     names of the runs on this server
-- {run}:state           hash    settings (batch, eta, max_steps, group_size, lease_ms, attempts_max) and
--                               state (nonce, lineage, head, version, tail, clock, last, ended, lease_number)
-- {run}:step            string  the newest committed version, for readers
-- {run}:counts          hash    the ledger: admitted leased queued assigned trained dropped:<reason> refused:<reason>
-- {run}:outstanding     hash    deadline -> groups leased or queued
-- {run}:leases          zset    lease token, scored by expiry on the run's clock (ms)
-- {run}:leased          hash    lease token -> {group, position, attempt, actor, epoch, version, deadline} (JSON)
-- {run}:ready           zset    group id, scored by deadline
-- {run}:groups          hash    group id of a queued or assigned group ->
--                               {entry, token, position, deadline, version_min} (JSON)
-- {run}:manifests       hash    step -> [[group id, entry id, version_min], ...] (JSON), until covered
-- {run}:prompts         list    "position attempt" of each queued prompt; leases pop the head
-- {run}:prompt          hash    position -> prompt record, from feed until its group is trained or retired
-- {run}:versions        hash    version -> digest of every committed version
-- {run}:staleness       hash    staleness in steps -> trained groups
-- {run}:actors          hash    actor -> {epoch, version, state, beat, host, stats} (JSON)
-- {run}:answers         hash    actor -> {request, reply}: its last admit, for a repeat (msgpack)
-- {run}:epochs          hash    `learner` or `actor:<name>` -> "number:random", the epoch that may write
-- {run}:places          list    one token for each freed place, capped; actors block on it
-- {run}:bell            list    at most one token: a batch may be ready; the learner blocks on it
-- {run}:dead            stream  prompts retired after attempts_max leases, with the reason
-- {run}:progress        hash    the learner's figures of the newest step, for readers; written by the learner alone
-- {run}:config, files    string, hash  configuration and model files for actors; written by the learner alone
-- {run}:mail:<actor>, scores:<actor>  list  requests of the learner to an actor, and its answers (JSON)
-- {run}:actor_numbers   string  actor names given out; written by `launch actors`
-- {run}:stop            string  set by `launch stop`: no more leases, the learner ends after its step
-- {run}:stream          stream  payloads, one entry a group, written by the caller beside `publish`

local EXPIRE_MAX = 64 -- leases expired in one call, so that no call is long

local function names(run)
  return setmetatable({}, { __index = function(_, name) return run .. ':' .. name end })
end

-- Only before the first write.
local function fail(code, message)
  error({ err = 'SLIP' .. code .. ' ' .. message })
end

local function integer(value, name)
  local number = tonumber(value)
  if not number or number ~= math.floor(number) then
    fail('ARGUMENT', name .. ': got ' .. tostring(value) .. ', expected an integer')
  end
  return number
end

local function text(value, name)
  if value == nil or value == '' then fail('ARGUMENT', name .. ': got nothing, expected text') end
  return value
end

local function hash(key)
  local flat, map = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do map[flat[i]] = tonumber(flat[i + 1]) or flat[i + 1] end
  return map
end

local STRINGS = { nonce = true, ended = true }

local function load_state(K)
  local flat, S = redis.call('HGETALL', K.state), {}
  if #flat == 0 then fail('NORUN', 'no run ' .. K.state:sub(1, -7) .. ' on this server') end
  for i = 1, #flat, 2 do
    S[flat[i]] = STRINGS[flat[i]] and flat[i + 1] or tonumber(flat[i + 1])
  end
  return S
end

local function check_epoch(K, role, epoch)
  local current = redis.call('HGET', K.epochs, role)
  if current ~= epoch then
    fail('FENCED', role .. ': epoch ' .. tostring(epoch) .. ' was replaced by ' .. tostring(current or 'none'))
  end
end

local function actor_record(K, actor)
  local record = redis.call('HGET', K.actors, actor)
  if not record then fail('FENCED', 'actor:' .. actor .. ' has left') end
  return cjson.decode(record)
end

local function over(K, S)
  return S.ended ~= '' or S.head >= S.max_steps or redis.call('EXISTS', K.stop) == 1
end

-- Outstanding groups with deadline <= d, as a function of d, from one read.
local function outstanding(K)
  local at = hash(K.outstanding)
  return function(d)
    local total = 0
    for deadline, count in pairs(at) do
      if tonumber(deadline) <= d then total = total + count end
    end
    return total
  end
end

local function count(K, name, by) redis.call('HINCRBY', K.counts, name, by) end

local function release_place(K, S, places)
  local cap = S.batch * (S.eta + 1)
  for _ = 1, math.min(places, cap) do redis.call('RPUSH', K.places, '1') end
  redis.call('LTRIM', K.places, 0, cap - 1)
end

local function settle(K, deadline) -- one group of this deadline is no longer outstanding
  if redis.call('HINCRBY', K.outstanding, deadline, -1) <= 0 then
    redis.call('HDEL', K.outstanding, deadline)
  end
end

-- Ends a lease without a group: the prompt goes back to the head with one more attempt, or is retired.
local function close_lease(K, S, token, lease, reason)
  redis.call('ZREM', K.leases, token)
  redis.call('HDEL', K.leased, token)
  settle(K, lease.deadline)
  count(K, 'leased', -1)
  count(K, 'dropped:' .. reason, 1)
  local attempt = lease.attempt + 1
  if attempt < S.attempts_max then
    redis.call('LPUSH', K.prompts, lease.position .. ' ' .. attempt)
  else
    local prompt = redis.call('HGET', K.prompt, lease.position) or ''
    redis.call('XADD', K.dead, '*', 'group', lease.group, 'reason', reason, 'prompt', prompt)
    redis.call('HDEL', K.prompt, lease.position)
  end
  release_place(K, S, 1)
end

-- The run's own clock: it advances by at most 1 s a call, so a server that was stopped, or whose
-- clock jumped, expires nothing. Expires what is due.
local function tick(K, S)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  S.clock = S.clock + math.max(0, math.min(1000, now - S.last))
  redis.call('HSET', K.state, 'clock', S.clock, 'last', now)
  for _, token in ipairs(redis.call('ZRANGEBYSCORE', K.leases, '-inf', S.clock, 'LIMIT', 0, EXPIRE_MAX)) do
    close_lease(K, S, token, cjson.decode(redis.call('HGET', K.leased, token)), 'expired')
  end
end

local SETTINGS = { 'batch', 'eta', 'max_steps', 'group_size', 'lease_ms', 'attempts_max' }

-- join learner <random> <nonce> <batch> <eta> <max_steps> <group_size> <lease_ms> <attempts_max>
--   creates the run if there is none. Answers {epoch, nonce, lineage, head, version, tail}.
local function join_learner(K, args)
  local random, nonce, wanted = text(args[2], 'random'), text(args[3], 'nonce'), {}
  for i, name in ipairs(SETTINGS) do wanted[name] = integer(args[i + 3], name) end
  local created = redis.call('EXISTS', K.state) == 0
  local S = created and wanted or load_state(K)
  for _, name in ipairs(SETTINGS) do
    if S[name] ~= wanted[name] then
      fail('SETTINGS', name .. ': this run has ' .. S[name] .. ', the learner asks for ' .. wanted[name])
    end
  end
  local epoch = redis.call('HGET', K.epochs, 'learner')
  if not epoch or epoch:match(':(.*)$') ~= random then
    epoch = (tonumber((epoch or '0'):match('^%d+')) + 1) .. ':' .. random
  end
  if created then
    local time = redis.call('TIME')
    for _, name in ipairs(SETTINGS) do redis.call('HSET', K.state, name, wanted[name]) end
    redis.call('HSET', K.state, 'nonce', nonce, 'lineage', 0, 'head', 0, 'version', -1, 'tail', 0, 'clock', 0,
      'last', time[1] * 1000 + math.floor(time[2] / 1000), 'ended', '', 'lease_number', 0)
    S = load_state(K)
  end
  redis.call('HSET', K.epochs, 'learner', epoch)
  redis.call('DEL', K.stop)
  return cmsgpack.pack({ epoch, S.nonce, S.lineage, S.head, S.version, S.tail })
end

-- join actor <random> <name> <host>. Answers {epoch, nonce, lineage, head, version, tail}.
-- The actor serves no version until `applied`; an older epoch of the name is fenced.
local function join_actor(K, args)
  local random, name, host = text(args[2], 'random'), text(args[3], 'name'), text(args[4], 'host')
  local S = load_state(K)
  local role = 'actor:' .. name
  local epoch = redis.call('HGET', K.epochs, role)
  if not epoch or epoch:match(':(.*)$') ~= random then
    epoch = (tonumber((epoch or '0'):match('^%d+')) + 1) .. ':' .. random
  end
  redis.call('HSET', K.epochs, role, epoch)
  redis.call('HDEL', K.answers, name)
  redis.call('HSET', K.actors, name, cjson.encode({
    epoch = epoch, version = -1, state = 'starting', beat = S.clock, host = host }))
  return cmsgpack.pack({ epoch, S.nonce, S.lineage, S.head, S.version, S.tail })
end

local function join(run, args)
  local K = names(run[1])
  if args[1] == 'learner' then return join_learner(K, args) end
  if args[1] == 'actor' then return join_actor(K, args) end
  fail('ARGUMENT', 'role: got ' .. tostring(args[1]) .. ', expected learner or actor')
end

-- feed <epoch> <position> <prompt>... appends prompts; position must be the queue's tail.
-- Answers {tail, queued}.
local function feed(run, args)
  local K = names(run[1])
  local S = load_state(K)
  check_epoch(K, 'learner', args[1])
  local position, fed = integer(args[2], 'position'), #args - 2
  if fed < 1 then fail('ARGUMENT', 'prompts: got none, expected at least one') end
  if position + fed > S.tail then
    if position ~= S.tail then
      fail('POSITION', 'got position ' .. position .. ', the queue\'s tail is ' .. S.tail)
    end
    for i = 1, fed do
      redis.call('HSET', K.prompt, position + i - 1, args[i + 2])
      redis.call('RPUSH', K.prompts, (position + i - 1) .. ' 0')
    end
    S.tail = position + fed
    redis.call('HSET', K.state, 'tail', S.tail)
    release_place(K, S, fed)
  end
  return cmsgpack.pack({ S.tail, redis.call('LLEN', K.prompts) })
end

-- Why this actor gets no lease now, or nil and the deadline it may have.
local function admission(K, S, actor)
  if over(K, S) then return 'end' end
  local version = actor.version
  if version < 0 then return 'no-weights' end
  local deadline = math.min(version, S.head) + S.eta
  if deadline < S.head then return 'old-weights' end
  local out = outstanding(K)
  for d = deadline, S.head + S.eta do
    if out(d) + 1 > (d - S.head + 1) * S.batch then return 'full' end
  end
  if out(math.huge) + 1 > (S.max_steps - S.head) * S.batch then return 'enough' end
  if redis.call('LLEN', K.prompts) == 0 then return 'no-prompts' end
  return nil, deadline
end

-- admit <actor> <epoch> <request> <random>: one lease, or the reason to wait.
-- Answers {{status, reason, token, group, position, attempt, version, deadline}, prompt record}.
local function admit(run, args)
  local K = names(run[1])
  local S = load_state(K)
  local name, request, random = text(args[1], 'actor'), integer(args[3], 'request'), text(args[4], 'random')
  check_epoch(K, 'actor:' .. name, args[2])
  local actor = actor_record(K, name)
  local last = redis.call('HGET', K.answers, name)
  if last then
    last = cmsgpack.unpack(last)
    if last[1] == request then return last[2] end
  end
  tick(K, S)
  local reason, deadline = admission(K, S, actor)
  if reason then
    return { cmsgpack.pack({ 'wait', reason, '', '', 0, 0, 0, 0 }), '' }
  end
  local position, attempt = redis.call('LPOP', K.prompts):match('^(%d+) (%d+)$')
  position, attempt = tonumber(position), tonumber(attempt)
  local number = redis.call('HINCRBY', K.state, 'lease_number', 1)
  local token = number .. ':' .. random
  local group = string.format('%04d-%010d-%02d', S.lineage, position, attempt)
  redis.call('ZADD', K.leases, S.clock + S.lease_ms, token)
  redis.call('HSET', K.leased, token, cjson.encode({
    group = group, position = position, attempt = attempt, actor = name, epoch = args[2],
    version = actor.version, deadline = deadline }))
  redis.call('HINCRBY', K.outstanding, deadline, 1)
  count(K, 'admitted', 1)
  count(K, 'leased', 1)
  local meta = { 'lease', '', token, group, position, attempt, actor.version, deadline }
  local reply = { cmsgpack.pack(meta), redis.call('HGET', K.prompt, position) or '' }
  redis.call('HSET', K.answers, name, cmsgpack.pack({ request, reply }))
  return reply
end

-- heartbeat <actor> <epoch> <state> <stats JSON> <token>...: renews the leases it lists and no others.
-- Answers {head, version, over, ended, {tokens that are no longer leases}}.
local function heartbeat(run, args)
  local K = names(run[1])
  local S = load_state(K)
  local name = text(args[1], 'actor')
  check_epoch(K, 'actor:' .. name, args[2])
  local actor = actor_record(K, name)
  local valid, stats = pcall(cjson.decode, args[4])
  -- An array, or a NaN that cjson reads but cannot write, would break the actor's record for every reader.
  if not valid or not args[4]:match('^%s*{') or not pcall(cjson.encode, stats) then
    fail('ARGUMENT', 'stats: got ' .. tostring(args[4]) .. ', expected a JSON object')
  end
  tick(K, S)
  local lost = {}
  for i = 5, #args do
    if redis.call('ZSCORE', K.leases, args[i]) then
      redis.call('ZADD', K.leases, S.clock + S.lease_ms, args[i])
    else
      lost[#lost + 1] = args[i]
    end
  end
  actor.state, actor.stats, actor.beat = args[3], stats, S.clock
  redis.call('HSET', K.actors, name, cjson.encode(actor))
  return cmsgpack.pack({ S.head, S.version, over(K, S), S.ended, lost })
end

-- publish <actor> <epoch> <token> <group> <version_min> <"version:digest">...
-- In one MULTI after the XADD of the payload; the newest entry is that payload, and is deleted if refused.
-- Answers {status, reason, entry}: `ok`; `late` (lease gone: unknown or duplicate); `refused` (engine).
local function publish(run, args)
  local K = names(run[1])
  local entry = redis.call('XREVRANGE', K.stream, '+', '-', 'COUNT', 1)[1][1]
  local function refuse(status, reason)
    redis.call('XDEL', K.stream, entry)
    return cmsgpack.pack({ status, reason, '' })
  end
  if redis.call('EXISTS', K.state) == 0 then redis.call('XDEL', K.stream, entry) end -- then load_state fails
  local S = load_state(K)
  local name, token, group = args[1], args[3], args[4]
  if redis.call('HGET', K.epochs, 'actor:' .. name) ~= args[2] then
    count(K, 'refused:fenced', 1)
    return refuse('late', 'fenced')
  end
  local lease = redis.call('HGET', K.leased, token)
  if not lease then
    local known = redis.call('HGET', K.groups, group)
    if known and cjson.decode(known).token == token then
      redis.call('XDEL', K.stream, entry)
      return cmsgpack.pack({ 'ok', 'repeat', cjson.decode(known).entry })
    end
    count(K, 'refused:unknown', 1)
    return refuse('late', 'unknown')
  end
  lease = cjson.decode(lease)
  local version_min, lowest = tonumber(args[5]), math.huge
  local sound = lease.group == group and version_min and version_min >= lease.version
  for i = 6, #args do
    local version, digest = args[i]:match('^(%d+):(.+)$')
    sound = sound and version and redis.call('HGET', K.versions, version) == digest
    if sound then lowest = math.min(lowest, tonumber(version)) end
  end
  sound = sound and lowest == version_min
  if not sound then
    close_lease(K, S, token, lease, 'engine')
    return refuse('refused', 'engine')
  end
  redis.call('ZREM', K.leases, token)
  redis.call('HDEL', K.leased, token)
  redis.call('HSET', K.groups, group, cjson.encode({
    entry = entry, token = token, position = lease.position, deadline = lease.deadline, version_min = version_min }))
  redis.call('ZADD', K.ready, lease.deadline, group)
  count(K, 'leased', -1)
  count(K, 'queued', 1)
  if redis.call('ZCARD', K.ready) >= S.batch then
    redis.call('RPUSH', K.bell, '1')
    redis.call('LTRIM', K.bell, 0, 0)
  end
  return cmsgpack.pack({ 'ok', '', entry })
end

-- drop <actor> <epoch> <token> <reason>: hands a lease back. A lease that is gone is not an error.
-- Answers {dropped}.
local REASONS = { released = true, engine = true, reward = true, poison = true }
local function drop(run, args)
  local K = names(run[1])
  local S = load_state(K)
  check_epoch(K, 'actor:' .. text(args[1], 'actor'), args[2])
  local token, reason = text(args[3], 'token'), args[4]
  if not REASONS[reason] then fail('ARGUMENT', 'reason: got ' .. tostring(reason)) end
  local lease = redis.call('HGET', K.leased, token)
  if lease then close_lease(K, S, token, cjson.decode(lease), reason) end
  return cmsgpack.pack({ lease and true or false })
end

-- assign <epoch> <step>: the manifest of the step; at the head, the earliest-deadline batch if it is safe.
-- Answers {status, reason, manifest JSON, ready}: `batch`, `wait` (few, unsafe) or `end`.
local function assign(run, args)
  local K = names(run[1])
  local S = load_state(K)
  check_epoch(K, 'learner', args[1])
  local step = integer(args[2], 'step')
  if step > S.head then fail('STEP', 'got step ' .. step .. ', the next to assign is ' .. S.head) end
  if step < S.head then
    local manifest = redis.call('HGET', K.manifests, step)
    if not manifest then fail('STEP', 'the manifest of step ' .. step .. ' was covered and is gone') end
    return cmsgpack.pack({ 'batch', 'repeat', manifest, redis.call('ZCARD', K.ready) })
  end
  tick(K, S)
  local ready = redis.call('ZCARD', K.ready)
  local function wait(status, reason) return cmsgpack.pack({ status, reason, '', ready }) end
  if over(K, S) then return wait('end', '') end
  if ready < S.batch then return wait('wait', 'few') end
  local batch = redis.call('ZRANGE', K.ready, 0, S.batch - 1, 'WITHSCORES')
  local out = outstanding(K)
  for d = S.head, S.head + S.eta do
    local taken = 0
    for i = 2, #batch, 2 do
      if tonumber(batch[i]) <= d then taken = taken + 1 end
    end
    if out(d) - taken > (d - S.head) * S.batch then return wait('wait', 'unsafe') end
  end
  local manifest = {}
  for i = 1, #batch, 2 do
    local group = cjson.decode(redis.call('HGET', K.groups, batch[i]))
    manifest[#manifest + 1] = { batch[i], group.entry, group.version_min }
    redis.call('ZREM', K.ready, batch[i])
    settle(K, group.deadline)
  end
  manifest = cjson.encode(manifest)
  redis.call('HSET', K.manifests, step, manifest)
  redis.call('HSET', K.state, 'head', step + 1)
  count(K, 'queued', -S.batch)
  count(K, 'assigned', S.batch)
  release_place(K, S, S.batch)
  return cmsgpack.pack({ 'batch', '', manifest, ready - S.batch })
end

-- Deletes the payloads, group records and prompts of every manifest up to `covered`.
local function cover(K, covered)
  for _, step in ipairs(redis.call('HKEYS', K.manifests)) do
    if tonumber(step) <= covered then
      for _, row in ipairs(cjson.decode(redis.call('HGET', K.manifests, step))) do
        local group = redis.call('HGET', K.groups, row[1])
        if group then redis.call('HDEL', K.prompt, cjson.decode(group).position) end
        redis.call('XDEL', K.stream, row[2])
        redis.call('HDEL', K.groups, row[1])
      end
      redis.call('HDEL', K.manifests, step)
    end
  end
end

-- commit <epoch> <version> <digest> <covered>: step version-1 is trained and its weights have this digest.
-- `covered` is the last step that no restore can ask for again; payloads up to it are deleted.
-- Answers {version}.
local function commit(run, args)
  local K = names(run[1])
  local S = load_state(K)
  check_epoch(K, 'learner', args[1])
  local version, digest, covered = integer(args[2], 'version'), text(args[3], 'digest'), integer(args[4], 'covered')
  local known = redis.call('HGET', K.versions, version)
  if known then
    if known ~= digest then
      fail('DIGEST', 'version ' .. version .. ' was committed with digest ' .. known .. ', got ' .. digest)
    end
    return cmsgpack.pack({ S.version })
  end
  if version ~= S.version + 1 then
    fail('STEP', 'got version ' .. version .. ', the next to commit is ' .. (S.version + 1))
  end
  if covered >= version then fail('ARGUMENT', 'covered: got ' .. covered .. ', beyond the step trained') end
  local manifest = {}
  if version > 0 then
    manifest = redis.call('HGET', K.manifests, version - 1)
    if not manifest then fail('STEP', 'step ' .. (version - 1) .. ' was never assigned') end
    manifest = cjson.decode(manifest)
  end
  for _, row in ipairs(manifest) do redis.call('HINCRBY', K.staleness, version - 1 - row[3], 1) end
  count(K, 'assigned', 0 - #manifest) -- -0 is no integer to Redis 7.0
  count(K, 'trained', #manifest)
  redis.call('HSET', K.versions, version, digest)
  redis.call('HSET', K.state, 'version', version)
  redis.call('SET', K.step, version)
  cover(K, covered)
  return cmsgpack.pack({ version })
end

-- applied <actor> <epoch> <version> <digest>: the actor's engine serves this committed version.
-- Answers {version}.
local function applied(run, args)
  local K = names(run[1])
  load_state(K)
  local name, version = text(args[1], 'actor'), integer(args[3], 'version')
  check_epoch(K, 'actor:' .. name, args[2])
  local actor = actor_record(K, name)
  local digest = redis.call('HGET', K.versions, version)
  if digest ~= args[4] then
    fail('DIGEST', 'version ' .. version .. ': got digest ' .. tostring(args[4]) .. ', committed is '
      .. tostring(digest or 'none'))
  end
  actor.version = version
  redis.call('HSET', K.actors, name, cjson.encode(actor))
  return cmsgpack.pack({ version })
end

-- leave actor <name> <epoch>: its leases are released and it is gone.
-- leave learner <reason> <epoch>: the run is ended for that reason.
-- Answers {released}.
local function leave(run, args)
  local K = names(run[1])
  local S = load_state(K)
  if args[1] == 'learner' then
    check_epoch(K, 'learner', args[3])
    redis.call('HSET', K.state, 'ended', text(args[2], 'reason'))
    return cmsgpack.pack({ 0 })
  end
  local name, released = text(args[2], 'name'), 0
  check_epoch(K, 'actor:' .. name, args[3])
  local held = redis.call('HGETALL', K.leased)
  for i = 1, #held, 2 do
    local lease = cjson.decode(held[i + 1])
    if lease.actor == name then
      close_lease(K, S, held[i], lease, 'released')
      released = released + 1
    end
  end
  redis.call('HDEL', K.actors, name)
  redis.call('HDEL', K.answers, name)
  return cmsgpack.pack({ released })
end

-- snapshot: the whole control state at one instant. Answers the hashes, then sizes.
local function snapshot(run)
  local K = names(run[1])
  load_state(K)
  return {
    redis.call('HGETALL', K.state), redis.call('HGETALL', K.counts), redis.call('HGETALL', K.staleness),
    redis.call('HGETALL', K.actors), redis.call('HGETALL', K.outstanding), redis.call('HGETALL', K.progress),
    { 'prompts', redis.call('LLEN', K.prompts), 'leases', redis.call('ZCARD', K.leases),
      'ready', redis.call('ZCARD', K.ready), 'payloads', redis.call('XLEN', K.stream),
      'dead', redis.call('XLEN', K.dead), 'stopping', redis.call('EXISTS', K.stop) },
  }
end

-- Over maxmemory the run must still drain, so all but those that add payload or leases may write.
local function register(name, callback, flags)
  redis.register_function({ function_name = 'slipstream1_' .. name, callback = callback, flags = flags })
end
register('join', join, { 'allow-oom' })
register('feed', feed)
register('admit', admit)
register('heartbeat', heartbeat, { 'allow-oom' })
register('publish', publish)
register('drop', drop, { 'allow-oom' })
register('assign', assign, { 'allow-oom' })
register('commit', commit, { 'allow-oom' })
register('applied', applied, { 'allow-oom' })
register('leave', leave, { 'allow-oom' })
register('snapshot', snapshot, { 'no-writes', 'allow-oom' })

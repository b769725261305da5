-- From lease to step: publish, assign, strike.

local TIMES = 512 -- group times kept for the run's p99
local OWN_TIMES = 20 -- and for each actor's p90

-- How long a group took its actor, or had taken when it was abandoned.
local function remember(C, actor, ms)
  local work = work_of(C, actor)
  table.insert(work.times, 1, ms)
  work.times[OWN_TIMES + 1] = nil
  save_work(C, actor)
end

-- Notes how long a group took, on the run's clock. A probe that comes in fast halves what stands against its actor:
-- a few of them clear its name, one by chance does not.
local function note_time(C, lease)
  local S, ms, work = C.S, C.S.clock - lease.born, work_of(C, lease.actor)
  if lease.probe and ms <= 2 * S.fleet_ms then
    for i = #work.times, math.floor(#work.times / 2) + 1, -1 do work.times[i] = nil end
  end
  remember(C, lease.actor, ms)
  write(C, 'LPUSH', C.key.times, ms)
  write(C, 'LTRIM', C.key.times, 0, TIMES - 1)
  set(C, 'published', S.published + 1)
  if S.published <= 16 or S.published % 16 == 0 then
    local times = call('LRANGE', C.key.times, 0, TIMES - 2)
    for i, value in ipairs(times) do times[i] = tonumber(value) end
    times[#times + 1] = ms
    table.sort(times)
    set(C, 'p99_ms', times[math.ceil(0.99 * #times)])
  end
end

-- Whether the versions a group names ("number:digest") are committed ones, the oldest of them is `version_min`, and
-- none is older than the lease's.
local function sound(C, lease, group, version_min, args, from)
  if lease.group ~= group or not version_min or version_min < lease.version then return false end
  local lowest = math.huge
  for i = from, #args do
    local version, digest = args[i]:match('^(%d+):(.+)$')
    if not version or call('HGET', C.key.versions, version) ~= digest then return false end
    lowest = math.min(lowest, tonumber(version))
  end
  return lowest == version_min
end

-- publish <actor> <epoch> <token> <group> <bytes> <tokens> <entry> <version_min> <"version:digest">...
-- With entry '', in one MULTI after the XADD of the payload: the newest entry is that payload, and is deleted if
-- refused. With shards, `entry` names the payload, and the caller deletes it unless it is the entry answered.
-- Answers {status, reason, entry}: `ok`; `late` (lease gone: unknown or duplicate); `refused` (engine).
local function publish(run, args)
  local key = run[1]
  local entry, own = args[7], args[7] == ''
  if own then entry = call('XREVRANGE', key .. ':stream', '+', '-', 'COUNT', 1)[1][1] end
  if own and call('EXISTS', key .. ':state') == 0 then call('XDEL', key .. ':stream', entry) end -- begin fails
  local C = begin(run)
  local S, name, token, group = C.S, args[1], args[3], args[4]
  local bytes, tokens = integer(args[5], 'bytes'), integer(args[6], 'tokens')
  local function answer(status, reason, at)
    if own and at ~= entry then write(C, 'XDEL', C.key.stream, entry) end
    finish(C)
    return cmsgpack.pack({ status, reason, at })
  end
  if call('HGET', C.key.epochs, 'actor:' .. name) ~= args[2] then
    count(C, 'refused:fenced', 1)
    return answer('late', 'fenced', '')
  end
  local lease = lease_of(C, token)
  if not lease then
    local known = group_row(C, group)
    if known and known.token == token then return answer('ok', 'repeat', known.entry) end
    local reason = known and 'duplicate' or 'unknown'
    count(C, 'refused:' .. reason, 1)
    return answer('late', reason, '')
  end
  local version_min = tonumber(args[8])
  if not sound(C, lease, group, version_min, args, 9) then
    close_lease(C, token, lease, 'engine')
    return answer('refused', 'engine', '')
  end
  forget_lease(C, token, lease)
  note_time(C, lease)
  write(C, 'HSET', C.key.groups, group, cjson.encode({
    entry = entry, token = token, position = lease.position, attempt = lease.attempt, limit = lease.limit,
    deadline = lease.deadline, version_min = version_min, bytes = bytes, tokens = tokens, strikes = 0 }))
  write(C, 'ZADD', C.key.ready, lease.deadline, group)
  count(C, 'queued', 1)
  set(C, 'bytes_held', S.bytes_held + bytes)
  set(C, 'bytes_peak', math.max(bytes, math.floor(S.bytes_peak * 0.995)))
  if call('ZCARD', C.key.ready) + 1 >= S.batch or S.data_end >= 0 then C.ring = true end
  return answer('ok', '', entry)
end

-- How many more groups with a deadline of at most d than the steps after this one can take, once `taken` is trained.
local function excess(C, taken, d)
  local due = 0
  for _, row in ipairs(taken) do
    if row.deadline <= d then due = due + 1 end
  end
  return out(C, d) - due - (d - C.S.head) * C.S.batch
end

-- Over the horizon of the safety test: is the batch safe? With over-sampling only what is due now must be gone.
local function horizon(S) return S.cap > S.batch and S.head or S.head + S.eta end

local function safe(C, taken)
  for d = C.S.head, horizon(C.S) do
    if excess(C, taken, d) > 0 then return false end
  end
  return true
end

-- Abandons the fewest leased groups, earliest deadline first, that make the batch safe: under `wait` only those of
-- slow actors, under `drop` any. Called only when the batch is not safe as it is.
local function abandon(C, taken)
  local S, held, late = C.S, {}, {}
  for token, packed in pairs(map_of(call('HGETALL', C.key.leased))) do
    local lease = not C.closed[token] and cjson.decode(packed)
    local actor = lease and lease.actor
    if actor and late[actor] == nil then late[actor] = slow(C, work_of(C, actor), S.head + S.eta) end
    if lease and (S.policy == 'drop' or lease.probe or late[actor]) then held[#held + 1] = { token = token, lease = lease } end
  end
  -- Of equal deadlines the youngest lease goes first: it has the least work in it.
  table.sort(held, function(a, b)
    if a.lease.deadline ~= b.lease.deadline then return a.lease.deadline < b.lease.deadline end
    return tonumber(a.token:match('^%d+')) > tonumber(b.token:match('^%d+'))
  end)
  local chosen, gone = {}, {}
  for d = S.head, horizon(S) do
    local spare = 0
    for _, deadline in ipairs(gone) do
      if deadline <= d then spare = spare + 1 end
    end
    local need = excess(C, taken, d) - spare
    for i, one in ipairs(held) do
      if need <= 0 or one.lease.deadline > d then break end
      if not chosen[i] then
        chosen[i], need, gone[#gone + 1] = true, need - 1, one.lease.deadline
      end
    end
    if need > 0 and S.cap == S.batch then return end -- nothing is given up in vain
  end
  for i, one in ipairs(held) do
    local reason = (one.lease.probe or late[one.lease.actor]) and 'slow' or 'stale'
    if chosen[i] then
      remember(C, one.lease.actor, S.clock - one.lease.born)
      close_lease(C, one.token, one.lease, reason)
    end
  end
end

-- Ready groups that are due now and find no place in the batch: only over-sampling makes them.
local function drop_surplus(C, taken)
  local in_batch = {}
  for _, row in ipairs(taken) do in_batch[row.group] = true end
  for _, group in ipairs(call('ZRANGEBYSCORE', C.key.ready, '-inf', C.S.head)) do
    if not in_batch[group] then
      local row = group_row(C, group)
      drop_queued(C, row, 'surplus')
      write(C, 'HDEL', C.key.prompt, row.position)
    end
  end
end

-- No prompt is queued or leased any more, and none will be.
local function exhausted(C)
  return C.S.data_end >= 0 and queued_prompts(C) == 0 and call('ZCARD', C.key.leases) == 0
end

-- The pace of steps: time between two batches, but for waiting for groups under way; a moving average.
local function note_step(C)
  local S = C.S
  local unsafe = S.unsafe_ms + (S.unsafe_since > 0 and S.clock - S.unsafe_since or 0)
  if S.assigned_at > 0 then
    local ms = math.max(1, S.clock - S.assigned_at - unsafe)
    set(C, 'step_ms', S.step_ms == 0 and ms or math.floor(0.7 * S.step_ms + 0.3 * ms))
  end
  set(C, 'assigned_at', S.clock)
  set(C, 'unsafe_ms', 0)
  set(C, 'unsafe_since', 0)
end

local function take(C, step, taken)
  local rows = {}
  for i, row in ipairs(taken) do
    rows[i] = { row.group, row.entry, row.version_min, row.bytes, row.tokens }
    write(C, 'ZREM', C.key.ready, row.group)
    add_outstanding(C, row.deadline, -1)
  end
  local manifest = cjson.encode({ rows = rows, strikes = {} })
  write(C, 'HSET', C.key.manifests, step, manifest)
  count(C, 'queued', -#rows)
  count(C, 'assigned', #rows)
  set(C, 'head', step + 1)
  note_step(C)
  C.places = C.places + #rows
  return manifest
end

-- assign <epoch> <step>: the manifest of the step; at the head, the earliest-deadline batch if it is safe.
-- Answers {status, reason, manifest JSON, ready}: `batch`, `wait` (few, memory, unsafe, uncovered) or `end`.
local function assign(run, args)
  local C = begin(run)
  local S, step = C.S, integer(args[2], 'step')
  check_epoch(C, 'learner', args[1])
  if step > S.head then fail('BEHIND', 'step: got ' .. step .. ', the next to assign is ' .. S.head) end
  local ready = call('ZCARD', C.key.ready)
  if step < S.head then
    local manifest = call('HGET', C.key.manifests, step)
    if not manifest then fail('STEP', 'the manifest of step ' .. step .. ' was covered and is gone') end
    return cmsgpack.pack({ 'batch', 'repeat', manifest, ready })
  end
  tick(C)
  local function answer(status, reason)
    finish(C)
    return cmsgpack.pack({ status, reason, '', ready })
  end
  local short = ready < S.batch and exhausted(C)
  if over(C) or (short and ready == 0) then return answer('end', '') end
  local function stalled()
    if S.unsafe_since == 0 then set(C, 'unsafe_since', math.max(1, S.clock)) end
  end
  if ready < S.batch and not short then
    -- With every place taken it is not for want of actors that few are ready.
    if out(C, math.huge) >= (S.eta + 1) * S.cap then stalled() end
    return answer('wait', memory_full(C) and 'memory' or 'few')
  end
  if S.uncovered_max > 0 and step - math.max(S.checkpoint, S.wanted + 1) >= S.uncovered_max then return answer('wait', 'uncovered') end
  local taken = {}
  for i, group in ipairs(call('ZRANGE', C.key.ready, 0, S.batch - 1)) do taken[i] = group_row(C, group) end
  if not safe(C, taken) then abandon(C, taken) end
  if S.cap > S.batch then drop_surplus(C, taken) end
  if not safe(C, taken) then
    stalled()
    return answer('wait', 'unsafe')
  end
  ready = ready - #taken
  local manifest = take(C, step, taken)
  finish(C)
  return cmsgpack.pack({ 'batch', '', manifest, ready })
end

local STRIKES = 3 -- failures to decode a queued group after which it is dropped

-- strike <epoch> <step> <group> <reason> <payload>: a record that cannot be read. Of an assigned step, the step
-- trains without it; of a queued group (step -1), it is dropped at the third strike. Its prompt returns.
-- Answers {status}: `struck`, `counted`, or `gone`.
local function strike(run, args)
  local C = begin(run)
  check_epoch(C, 'learner', args[1])
  local step, group, reason, payload = integer(args[2], 'step'), text(args[3], 'group'), args[4], args[5] or ''
  if reason ~= 'poison' and reason ~= 'lost' then fail('ARGUMENT', 'reason: got ' .. tostring(reason)) end
  local row = group_row(C, group)
  if step < 0 then
    if not row or not call('ZSCORE', C.key.ready, group) then return cmsgpack.pack({ 'gone' }) end
    if row.strikes + 1 < STRIKES then
      row.strikes = row.strikes + 1
      write(C, 'HSET', C.key.groups, group, cjson.encode(row))
      finish(C)
      return cmsgpack.pack({ 'counted' })
    end
    drop_queued(C, row, reason)
  else
    local manifest = call('HGET', C.key.manifests, step)
    if not manifest then fail(step < C.S.head and 'STEP' or 'BEHIND', 'step ' .. step .. ' has no manifest') end
    manifest = cjson.decode(manifest)
    if manifest.strikes[group] then return cmsgpack.pack({ 'struck' }) end
    local listed = false
    for _, one in ipairs(manifest.rows) do listed = listed or one[1] == group end
    if not listed or not row then fail('STEP', 'group ' .. group .. ' is not in the manifest of step ' .. step) end
    if step < C.S.version then fail('TRAINED', 'group ' .. group .. ' was trained in step ' .. step .. '; fork to go on without it') end
    manifest.strikes[group] = reason
    write(C, 'HSET', C.key.manifests, step, cjson.encode(manifest))
    write(C, 'HDEL', C.key.groups, group)
    count(C, 'assigned', -1)
    count(C, 'dropped:' .. reason, 1)
    delete_payload(C, row)
  end
  give_back(C, row, reason, payload)
  C.places = C.places + 1
  finish(C)
  return cmsgpack.pack({ 'struck' })
end

-- What becomes of a group: the transitions of the ledger that more than one function makes.

local DEAD_BYTES = 32 * 1024 * 1024 -- dead letters beyond this are deleted, oldest first; their counts stay
local EXPIRE_MAX = 64 -- leases expired in one call, so that no call is long

local function group_id(S, position, attempt)
  return string.format('%04d-%010d-%02d', S.lineage, position, attempt)
end

local function bury(C, row, reason, prompt, payload)
  local size, held = #prompt + #payload, C.S.dead_bytes
  local oldest = held + size > DEAD_BYTES and call('XRANGE', C.key.dead, '-', '+', 'COUNT', 64) or {}
  for _, letter in ipairs(oldest) do
    if held + size <= DEAD_BYTES then break end
    local fields = map_of(letter[2])
    held = held - #fields.prompt - #fields.payload
    write(C, 'XDEL', C.key.dead, letter[1])
  end
  write(C, 'XADD', C.key.dead, '*', 'group', row.group, 'position', row.position, 'attempt', row.attempt,
    'reason', reason, 'prompt', prompt, 'payload', payload)
  set(C, 'dead_bytes', held + size)
  count(C, 'dead:' .. reason, 1)
end

-- Queues the prompt of a group again; one that a server which came back older was not fed again yet, when it is.
local function queue_again(C, queue, row, attempt)
  if row.position >= C.S.tail then write(C, 'HSET', C.key.skip, row.position, attempt)
  else queue[#queue + 1] = row.position .. ' ' .. attempt .. ' ' .. row.limit end
end

-- A prompt whose group came to nothing: back to the head (or tail) of the queue with one more attempt, or retired,
-- which makes a dead letter with the prompt. A payload that cannot be read makes one in any case.
local function give_back(C, row, reason, payload, to_tail)
  local attempt = row.attempt + (reason == 'lineage' and 0 or 1)
  if attempt < row.limit then
    queue_again(C, to_tail and C.tail or C.back, row, attempt)
    if payload ~= '' then bury(C, row, reason, '', payload) end
  else
    bury(C, row, reason, call('HGET', C.key.prompt, row.position) or '', payload)
    write(C, 'HDEL', C.key.prompt, row.position)
  end
end

local function lease_of(C, token)
  local lease = not C.closed[token] and call('HGET', C.key.leased, token)
  return lease and cjson.decode(lease) or nil
end

local function forget_lease(C, token, lease)
  C.closed[token] = true
  write(C, 'ZREM', C.key.leases, token)
  write(C, 'HDEL', C.key.leased, token)
  count(C, 'leased', -1)
  if lease.probe then set(C, 'probes', C.S.probes - 1) end
  local work = work_of(C, lease.actor)
  work.held[token] = nil
  save_work(C, lease.actor)
end

local function tokens_of(work)
  local tokens = {}
  for token in pairs(work.held) do tokens[#tokens + 1] = token end
  return tokens
end

-- In this order, closing leases leaves the prompt of the oldest one at the head of the queue.
local function newest_first(tokens)
  table.sort(tokens, function(a, b) return tonumber(a:match('^%d+')) > tonumber(b:match('^%d+')) end)
  return tokens
end

-- Ends a lease without a group. Filtered prompts are done with; stale ones go to the tail.
local function close_lease(C, token, lease, reason)
  forget_lease(C, token, lease)
  add_outstanding(C, lease.deadline, -1)
  count(C, 'dropped:' .. reason, 1)
  if reason == 'filtered' then write(C, 'HDEL', C.key.prompt, lease.position)
  else give_back(C, lease, reason, '', reason == 'stale') end
  C.places, C.ring = C.places + 1, true
end

local function delete_payload(C, row)
  if C.S.shards > 0 then write(C, 'RPUSH', C.key.trash, row.entry)
  else write(C, 'XDEL', C.key.stream, row.entry) end
  set(C, 'bytes_held', C.S.bytes_held - row.bytes)
end

local function group_row(C, group)
  local row = call('HGET', C.key.groups, group)
  if not row then return nil end
  row = cjson.decode(row)
  row.group = group
  return row
end

-- Forgets a queued group, payload and all, for a reason.
local function drop_queued(C, row, reason)
  write(C, 'ZREM', C.key.ready, row.group)
  write(C, 'HDEL', C.key.groups, row.group)
  add_outstanding(C, row.deadline, -1)
  count(C, 'queued', -1)
  count(C, 'dropped:' .. reason, 1)
  delete_payload(C, row)
  C.places, C.ring = C.places + 1, true
end

-- The run's own clock: it advances by at most 1 s a call, so a server that was stopped, or whose clock jumped,
-- expires nothing. Expires what is due.
local function tick(C)
  local S, time = C.S, call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  set(C, 'clock', S.clock + math.max(0, math.min(1000, now - S.last)))
  set(C, 'last', now)
  for _, token in ipairs(call('ZRANGEBYSCORE', C.key.leases, '-inf', S.clock, 'LIMIT', 0, EXPIRE_MAX)) do
    local lease = lease_of(C, token)
    close_lease(C, token, lease, lease.suspect and 'lost' or 'expired')
  end
end

-- One call: reads first, then all writes at once.
--
-- A function opens a call with `begin`, reads, changes the state in Lua tables, adds its writes to the list, and
-- ends with `finish`, which carries them out. No read sees a write of its own call. Should a write fail, the rest
-- is kept in the journal, and the next call finishes it first; the ledger's counts change in one command.

local function call(...) return redis.call(...) end -- the field itself is not there while the library loads

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

-- The geometric mean of times: what is usual where some take much longer.
local function usual(times)
  local sum = 0
  for _, ms in ipairs(times) do sum = sum + math.log(math.max(1, ms)) end
  return math.exp(sum / #times)
end

local function map_of(flat)
  local map = {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

local STRINGS = { nonce = true, ended = true, journal = true, policy = true }

local function read_state(C)
  local flat = call('HGETALL', C.key.state)
  if #flat == 0 then fail('NORUN', 'no run ' .. C.run .. ' on this server') end
  C.S = map_of(flat)
  for name, value in pairs(C.S) do
    if not STRINGS[name] then C.S[name] = tonumber(value) end
  end
end

local function carry_out(C, writes)
  for i, write in ipairs(writes) do
    local answer = redis.pcall(unpack(write))
    if type(answer) == 'table' and answer.err then
      local rest = {}
      for j = i, #writes do rest[#rest + 1] = writes[j] end
      call('HSET', C.key.state, 'journal', cmsgpack.pack(rest))
      error({ err = 'SLIPJOURNAL ' .. write[1] .. ' ' .. write[2] .. ' failed and is left to the next call: ' .. answer.err })
    end
  end
end

local function open(run)
  local C = { run = run[1], writes = {}, dirty = {}, changed = {}, closed = {}, popped = 0, back = {}, tail = {},
    places = 0 }
  C.key = setmetatable({}, { __index = function(_, name) return run[1] .. ':' .. name end })
  return C
end

local function begin(run)
  local C = open(run)
  read_state(C)
  if C.S.journal then
    carry_out(C, cmsgpack.unpack(C.S.journal))
    call('HDEL', C.key.state, 'journal')
    read_state(C)
  end
  return C
end

local function write(C, ...) C.writes[#C.writes + 1] = { ... } end

local function set(C, name, value)
  C.S[name], C.dirty[name] = value, true
end

-- The ledger. Values are absolute, so that one HSET changes all of them.
local function counted(C, name)
  if not C.counts then C.counts = map_of(call('HGETALL', C.key.counts)) end
  return tonumber(C.counts[name]) or 0
end

local function count(C, name, by)
  local before = counted(C, name)
  C.counts[name] = before + by
  C.changed[name] = true
end

-- Groups leased or queued, by deadline.
local function outstanding(C)
  if not C.out then
    C.out = {}
    for deadline, number in pairs(map_of(call('HGETALL', C.key.outstanding))) do
      C.out[tonumber(deadline)] = tonumber(number)
    end
  end
  return C.out
end

-- out(d): groups leased or queued with a deadline of at most d.
local function out(C, d)
  local total = 0
  for deadline, number in pairs(outstanding(C)) do
    if deadline <= d then total = total + number end
  end
  return total
end

local function add_outstanding(C, deadline, by)
  local at = outstanding(C)
  at[deadline] = (at[deadline] or 0) + by
  C.due = C.due or {}
  C.due[deadline] = true
end

-- Prompts. Those that return in this call go before the queue, and are the first to be taken again.
local function queued_prompts(C)
  return call('LLEN', C.key.prompts) - C.popped + #C.back + #C.tail
end

local function take_prompt(C)
  local row = table.remove(C.back)
  if not row then
    row = call('LINDEX', C.key.prompts, C.popped)
    C.popped = C.popped + 1
  end
  local position, attempt, limit = row:match('^(%d+) (%d+) (%d+)$')
  return tonumber(position), tonumber(attempt), tonumber(limit)
end

-- An actor's work: its last request and reply, open leases (token -> birth), group times.
local function work_of(C, actor)
  C.work = C.work or {}
  if not C.work[actor] then
    local packed = call('HGET', C.key.work, actor)
    C.work[actor] = packed and cmsgpack.unpack(packed) or { request = -1, held = {}, times = {}, probe = -60000 }
  end
  return C.work[actor]
end

local function save_work(C, actor)
  C.worked = C.worked or {}
  C.worked[actor] = true
end

local function flush_prompts(C)
  if C.popped > 0 then write(C, 'LPOP', C.key.prompts, C.popped) end
  for _, row in ipairs(C.back) do write(C, 'LPUSH', C.key.prompts, row) end
  for _, row in ipairs(C.tail) do write(C, 'RPUSH', C.key.prompts, row) end
end

local function flush_tables(C)
  local S, changes = C.S, { 'HSET', C.key.state }
  for name in pairs(C.dirty) do
    changes[#changes + 1] = name
    changes[#changes + 1] = S[name]
  end
  if #changes > 2 then C.writes[#C.writes + 1] = changes end
  local ledger = { 'HSET', C.key.counts }
  for name in pairs(C.changed) do
    ledger[#ledger + 1] = name
    ledger[#ledger + 1] = C.counts[name]
  end
  if #ledger > 2 then C.writes[#C.writes + 1] = ledger end
  for deadline in pairs(C.due or {}) do
    local number = C.out[deadline]
    if number > 0 then write(C, 'HSET', C.key.outstanding, deadline, number)
    else write(C, 'HDEL', C.key.outstanding, deadline) end
  end
  for actor in pairs(C.worked or {}) do
    write(C, 'HSET', C.key.work, actor, cmsgpack.pack(C.work[actor]))
  end
end

local function finish(C)
  flush_prompts(C)
  flush_tables(C)
  if C.places > 0 then
    local cap = C.S.cap * (C.S.eta + 1)
    local push = { 'RPUSH', C.key.places }
    for _ = 1, math.min(C.places, cap) do push[#push + 1] = '1' end
    C.writes[#C.writes + 1] = push
    write(C, 'LTRIM', C.key.places, 0, cap - 1)
  end
  if C.ring then
    write(C, 'DEL', C.key.bell)
    write(C, 'RPUSH', C.key.bell, '1')
  end
  carry_out(C, C.writes)
end

local function number_of(epoch) return tonumber((epoch or '0'):match('^%d+')) end

local function check_epoch(C, role, epoch)
  local current = call('HGET', C.key.epochs, role) or ''
  if current ~= epoch then
    fail('FENCED', role .. ': epoch ' .. tostring(epoch) .. ' is not the one that may write, ' ..
      (current == '' and 'none' or current))
  end
end

local function actor_record(C, actor)
  local record = call('HGET', C.key.actors, actor)
  if not record then fail('FENCED', 'actor:' .. actor .. ': epoch 0: is not the one that may write, none') end
  return cjson.decode(record)
end

local function over(C)
  return C.S.ended ~= '' or C.S.head >= C.S.max_steps or call('EXISTS', C.key.stop) == 1
end

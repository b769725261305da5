-- Prompts and leases: feed, requeue, admit, drop.

local PROBE_MS = 60000 -- a slow actor gets one lease in this time

-- feed <epoch> <position> <final 0|1> <prompt>...: appends prompts; position must be the queue's tail. `final` says
-- that no prompt will follow. Positions trained before Redis came back older are passed over.
-- Answers {tail, queued}.
local function feed(run, args)
  local C = begin(run)
  local S = C.S
  check_epoch(C, 'learner', args[1])
  local position, final, fed = integer(args[2], 'position'), integer(args[3], 'final'), #args - 3
  if fed < 1 and final == 0 then fail('ARGUMENT', 'prompts: got none, expected at least one') end
  if position + fed > S.tail or (final == 1 and S.data_end < 0) then
    if position ~= S.tail then
      fail('POSITION', 'got position ' .. position .. ', the queue\'s tail is ' .. S.tail)
    end
    for i = 1, fed do
      local at = position + i - 1
      local attempt = tonumber(call('HGET', C.key.skip, at) or 0)
      write(C, 'HDEL', C.key.skip, at)
      write(C, 'HSET', C.key.prompt, at, args[i + 3])
      if attempt >= 0 then C.tail[#C.tail + 1] = at .. ' ' .. attempt .. ' ' .. (attempt + S.attempts_max) end
    end
    set(C, 'tail', position + fed)
    if final == 1 then set(C, 'data_end', position + fed) end
    C.places, C.ring = fed, final == 1
  end
  local queued = queued_prompts(C)
  finish(C)
  return cmsgpack.pack({ S.tail, queued })
end

-- requeue <entry>: puts the prompt of a dead letter at the tail of the queue, for new groups. Answers {position}, -1 if
-- there is no such letter (any more).
local function requeue(run, args)
  local C = begin(run)
  local letter = call('XRANGE', C.key.dead, text(args[1], 'entry'), args[1])[1]
  if not letter then return cmsgpack.pack({ -1 }) end
  letter = map_of(letter[2])
  if letter.prompt == '' then fail('ARGUMENT', 'entry ' .. args[1] .. ' holds no prompt: its prompt went back to the queue') end
  local attempt = tonumber(letter.attempt) + 1
  if attempt + C.S.attempts_max > 100 then fail('ARGUMENT', 'entry ' .. args[1] .. ': its prompt had ' .. attempt .. ' attempts') end
  write(C, 'HSET', C.key.prompt, letter.position, letter.prompt)
  C.tail[1] = letter.position .. ' ' .. attempt .. ' ' .. (attempt + C.S.attempts_max)
  write(C, 'XDEL', C.key.dead, args[1])
  set(C, 'dead_bytes', C.S.dead_bytes - #letter.prompt - #letter.payload)
  C.places = 1
  finish(C)
  return cmsgpack.pack({ tonumber(letter.position) })
end

-- Too slow for its groups to be trained in time, while others are there that are not: judged by its last groups
-- and by open leases older than what is usual. Their p90 is beyond the time until the deadline, and their
-- geometric mean is so far above the fleet's that chance explains it once in a thousand at most, were group times
-- lognormal with sigma 1, as lengths are: e^(0.7 + 1.7 / sqrt n) times, 6.6 for two groups, 2.9 for twenty.
local function slow(C, work, deadline)
  local S, times = C.S, { unpack(work.times) }
  for _, born in pairs(work.held) do
    if S.clock - born > S.fleet_ms then times[#times + 1] = S.clock - born end
  end
  if #times == 0 then return false end
  table.sort(times)
  return S.live > 1 and S.step_ms > 0 and times[math.ceil(0.9 * #times)] > (deadline - S.head + 1) * S.step_ms
    and math.log(usual(times) / math.max(1, S.fleet_ms)) > 0.7 + 1.7 / math.sqrt(#times)
end

-- Whether the payload of one more group, beside those stored and those leased, would pass the limit.
local function memory_full(C)
  local S = C.S
  return S.bytes_limit > 0 and S.bytes_held + (counted(C, 'leased') + 1) * S.bytes_peak > S.bytes_limit
end

-- Why this actor gets no lease now; or nil, its deadline, and whether it is a slow actor's probe.
local function admission(C, actor, work)
  local S, probe = C.S, false
  if over(C) then return 'end' end
  if actor.version < 0 then return 'no-weights' end
  local deadline = math.min(actor.version, S.head) + S.eta
  if deadline < S.head then return 'old-weights' end
  if slow(C, work, deadline) then
    -- A probe that is due now would be waited for.
    if deadline == S.head or S.clock - work.probe < PROBE_MS then return 'slow' end
    probe = true
  end
  for d = deadline, S.head + S.eta do
    if out(C, d) + 1 > (d - S.head + 1) * S.cap then return 'full' end
  end
  if out(C, math.huge) + 1 > (S.max_steps - S.head) * S.cap then return 'enough' end
  if memory_full(C) then return 'memory' end
  if queued_prompts(C) == 0 then return 'no-prompts' end
  return nil, deadline, probe
end

local function grant(C, name, epoch, version, deadline, probe, random)
  local S, work = C.S, work_of(C, name)
  local position, attempt, limit = take_prompt(C)
  set(C, 'lease_number', S.lease_number + 1)
  local token = S.lease_number .. ':' .. random
  local group = group_id(S, position, attempt)
  write(C, 'ZADD', C.key.leases, S.clock + S.lease_ms, token)
  write(C, 'HSET', C.key.leased, token, cjson.encode({
    group = group, position = position, attempt = attempt, limit = limit, actor = name, epoch = epoch,
    version = version, deadline = deadline, born = S.clock, probe = probe or nil }))
  add_outstanding(C, deadline, 1)
  count(C, 'admitted', 1)
  count(C, 'leased', 1)
  work.held[token] = S.clock
  if probe then
    work.probe = S.clock
    set(C, 'probes', S.probes + 1)
  end
  return { cmsgpack.pack({ 'lease', '', token, group, position, attempt, version, deadline }),
    call('HGET', C.key.prompt, position) or '' }
end

-- admit <actor> <epoch> <request> <random>: one lease, or the reason to wait. Request numbers of an epoch rise; one
-- that was overtaken is refused, so that a call that arrives late leases nothing that nobody holds.
-- Answers {{status, reason, token, group, position, attempt, version, deadline}, prompt record}.
local function admit(run, args)
  local C = begin(run)
  local name, request, random = text(args[1], 'actor'), integer(args[3], 'request'), text(args[4], 'random')
  check_epoch(C, 'actor:' .. name, args[2])
  local actor, work = actor_record(C, name), work_of(C, name)
  if request == work.request then return work.reply end
  if request < work.request then
    fail('ARGUMENT', 'request: got ' .. request .. ', request ' .. work.request .. ' was answered already')
  end
  tick(C)
  local reason, deadline, probe = admission(C, actor, work)
  local reply = reason and { cmsgpack.pack({ 'wait', reason, '', '', 0, 0, 0, 0 }), '' }
    or grant(C, name, args[2], actor.version, deadline, probe, random)
  work.request, work.reply = request, reply
  save_work(C, name)
  finish(C)
  return reply
end

-- drop <actor> <epoch> <token> <reason>: hands a lease back. A lease that is gone is not an error.
-- Answers {dropped}.
local REASONS = { released = true, engine = true, reward = true, poison = true, filtered = true }
local function drop(run, args)
  local C, name = begin(run), text(args[1], 'actor')
  check_epoch(C, 'actor:' .. name, args[2])
  local token, reason = text(args[3], 'token'), args[4]
  if not REASONS[reason] then fail('ARGUMENT', 'reason: got ' .. tostring(reason)) end
  if reason == 'filtered' and C.S.dynamic == 0 then
    fail('ARGUMENT', 'reason: got filtered, but this run does no dynamic sampling')
  end
  local lease = lease_of(C, token)
  local mine = lease and lease.actor == name
  if mine then close_lease(C, token, lease, reason) end
  finish(C)
  return cmsgpack.pack({ mine and true or false })
end

-- A Redis that came back older than the learner is brought forward: reconcile.

-- Everything outstanding, by prompt position: leases {group, deadline, token, lease} and queued groups {..., row}.
local function outstanding_groups(C)
  local known = {}
  local function add(position, one)
    known[position] = known[position] or {}
    table.insert(known[position], one)
  end
  for token, packed in pairs(map_of(call('HGETALL', C.key.leased))) do
    local lease = cjson.decode(packed)
    add(lease.position, { group = lease.group, deadline = lease.deadline, token = token, lease = lease })
  end
  for _, group in ipairs(call('ZRANGE', C.key.ready, 0, -1)) do
    local row = group_row(C, group)
    add(row.position, { group = group, deadline = row.deadline, row = row })
  end
  return known
end

-- A group was assigned since: all that is outstanding of its prompt goes. Answers whether the group itself was known.
local function claim(C, known, group, position)
  local mine = false
  for _, one in ipairs(known[position] or {}) do
    if one.group ~= group then
      if one.token then
        forget_lease(C, one.token, one.lease)
        add_outstanding(C, one.deadline, -1)
        count(C, 'dropped:lost', 1)
      else
        drop_queued(C, one.row, 'lost')
      end
    else
      mine = true
      add_outstanding(C, one.deadline, -1)
      if one.token then
        forget_lease(C, one.token, one.lease)
      else
        write(C, 'ZREM', C.key.ready, group)
        count(C, 'queued', -1)
        set(C, 'bytes_held', C.S.bytes_held - one.row.bytes)
      end
    end
  end
  known[position] = nil
  return mine
end

-- Its groups become assigned, whatever Redis thought of them; strikes come after.
local function restore_manifest(C, known, done, step, manifest)
  for _, row in ipairs(manifest.rows) do
    local position, attempt = row[1]:match('^%d+%-(%d+)%-(%d+)$')
    position, attempt = tonumber(position), tonumber(attempt)
    if not claim(C, known, row[1], position) then count(C, 'admitted', 1) end
    count(C, 'assigned', 1)
    set(C, 'bytes_held', C.S.bytes_held + row[4])
    write(C, 'HSET', C.key.groups, row[1], cjson.encode({
      entry = row[2], token = '', position = position, attempt = attempt, limit = attempt + C.S.attempts_max,
      deadline = step, version_min = row[3], bytes = row[4], strikes = 0 }))
    local struck = manifest.strikes[row[1]]
    done[position] = { group = row[1], position = position, attempt = attempt, limit = attempt + C.S.attempts_max,
      reason = struck }
  end
end

local function restore_strikes(C, step, manifest)
  local packed = call('HGET', C.key.manifests, step)
  local struck = packed and cjson.decode(packed).strikes or {}
  for _, row in ipairs(manifest.rows) do
    local reason = manifest.strikes[row[1]]
    if reason and not struck[row[1]] then
      count(C, 'assigned', -1)
      count(C, 'dropped:' .. reason, 1)
      write(C, 'HDEL', C.key.groups, row[1])
      delete_payload(C, { entry = row[2], bytes = row[4] })
    end
  end
  write(C, 'HSET', C.key.manifests, step, cjson.encode(manifest))
end

-- The prompts of groups assigned since: gone from the queue, fed or still to be fed, but for those of struck groups.
local function settle_prompts(C, done)
  for _, row in ipairs(call('LRANGE', C.key.prompts, 0, -1)) do
    if done[tonumber(row:match('^%d+'))] then write(C, 'LREM', C.key.prompts, 1, row) end
  end
  local positions = {}
  for position in pairs(done) do positions[#positions + 1] = position end
  table.sort(positions, function(a, b) return a > b end)
  for _, position in ipairs(positions) do
    local row = done[position]
    if position >= C.S.tail then
      write(C, 'HSET', C.key.skip, position, row.reason and row.attempt + 1 or -1)
    elseif row.reason then
      give_back(C, row, row.reason, '')
    end
  end
end

-- Outstanding groups that the steps left can no longer take are lost, leased ones first; leases that are left are
-- suspect until a heartbeat lists them.
local function shed(C, known)
  local items = {}
  for _, group in pairs(known) do
    for _, one in ipairs(group) do items[#items + 1] = one end
  end
  table.sort(items, function(a, b)
    if a.deadline ~= b.deadline then return a.deadline < b.deadline end
    if (a.token ~= nil) ~= (b.token ~= nil) then return a.token ~= nil end
    return a.group > b.group
  end)
  local S = C.S
  for _, one in ipairs(items) do
    local room = true
    for d = one.deadline, math.max(one.deadline, S.head + S.eta) do
      room = room and out(C, d) <= math.max(0, (d - S.head + 1) * S.cap)
    end
    if not room and one.token then
      close_lease(C, one.token, one.lease, 'lost')
    elseif not room then
      drop_queued(C, one.row, 'lost')
      give_back(C, one.row, 'lost', '')
    elseif one.token then
      one.lease.suspect = true
      write(C, 'HSET', C.key.leased, one.token, cjson.encode(one.lease))
    end
  end
end

local function check_known(C, nonce, epoch, lineage, head, version, known)
  local S, current = C.S, call('HGET', C.key.epochs, 'learner') or '0:'
  if S.nonce ~= nonce then fail('NONCE', 'this server holds another run of this name: nonce ' .. S.nonce .. ', ours is ' .. nonce) end
  if current ~= epoch and number_of(current) >= number_of(epoch) then check_epoch(C, 'learner', epoch) end
  if S.lineage > lineage then fail('FENCED', 'learner: epoch ' .. epoch .. ' is not the one that may write, lineage ' .. S.lineage) end
  if S.lineage < lineage then fail('GAP', 'the server came back from before lineage ' .. lineage) end
  for step = S.version, head - 1 do
    if not known.manifests[tostring(step)] and (step >= S.head or step < version) then
      fail('GAP', 'the server came back at step ' .. S.head .. ', and the manifest of step ' .. step .. ' is not kept any more')
    end
  end
  for at = S.version + 1, version do
    if not known.versions[tostring(at)] then fail('GAP', 'the digest of version ' .. at .. ' is not kept any more') end
  end
end

-- reconcile <epoch> <nonce> <restarted 0|1> <lineage> <head> <version> <checkpoint> <covered> <known JSON>: what the
-- learner knows, `known` being {manifests: {step: manifest}, versions: {version: digest}} since its oldest checkpoint.
-- A server that came back older is brought forward: what was assigned or trained since is so again, what can no longer
-- be met is dropped as `lost`. Otherwise nothing changes. Answers {lineage, head, version, tail}.
local function reconcile(run, args)
  local C = begin(run)
  local S, epoch, nonce, restarted = C.S, text(args[1], 'epoch'), text(args[2], 'nonce'), args[3] == '1'
  local lineage, head, version = integer(args[4], 'lineage'), integer(args[5], 'head'), integer(args[6], 'version')
  local checkpoint, covered, known = integer(args[7], 'checkpoint'), integer(args[8], 'covered'), cjson.decode(args[9])
  check_known(C, nonce, epoch, lineage, head, version, known)
  write(C, 'HSET', C.key.epochs, 'learner', epoch)
  local open_groups, done = outstanding_groups(C), {}
  local older = S.head < head or S.version < version
  for step = math.max(0, S.version), head - 1 do
    local manifest = known.manifests[tostring(step)]
    if manifest and step >= S.head then restore_manifest(C, open_groups, done, step, manifest) end
    if manifest then restore_strikes(C, step, manifest) end
    if manifest and step < version then
      local trained = note_trained(C, manifest, step)
      count(C, 'assigned', -trained)
      count(C, 'trained', trained)
    end
  end
  for at = S.version + 1, version do write(C, 'HSET', C.key.versions, at, known.versions[tostring(at)]) end
  settle_prompts(C, done)
  set(C, 'head', math.max(S.head, head))
  set(C, 'version', math.max(S.version, version))
  set(C, 'checkpoint', math.max(S.checkpoint, checkpoint))
  set(C, 'wanted', math.max(S.wanted, covered))
  write(C, 'SET', C.key.step, S.version)
  if older or restarted then shed(C, open_groups) end
  if older then
    count(C, 'rollbacks', 1)
    C.ring = true
  end
  finish(C)
  return cmsgpack.pack({ S.lineage, S.head, S.version, S.tail })
end

-- Looking at a run, and the names under which Redis knows the functions.

-- snapshot: the whole control state at one instant. Answers the hashes, then sizes.
-- snapshot full: also every lease, every queued group with its deadline, and the manifests.
local function snapshot(run, args)
  local C = open(run)
  read_state(C)
  local K, full = C.key, args[1] == 'full'
  return {
    call('HGETALL', K.state), call('HGETALL', K.counts), call('HGETALL', K.staleness),
    call('HGETALL', K.actors), call('HGETALL', K.outstanding), call('HGETALL', K.progress),
    { 'prompts', call('LLEN', K.prompts), 'leases', call('ZCARD', K.leases),
      'ready', call('ZCARD', K.ready), 'groups', call('HLEN', K.groups), 'payloads', call('XLEN', K.stream),
      'dead', call('XLEN', K.dead), 'trash', call('LLEN', K.trash), 'forks', call('LLEN', K.forks),
      'stopping', call('EXISTS', K.stop) },
    full and call('HVALS', K.leased) or {},
    full and call('ZRANGE', K.ready, 0, -1, 'WITHSCORES') or {},
    full and call('HGETALL', K.manifests) or {},
  }
end

-- aged <ms>, on a payload stream: ids of entries older than this, at most 1000, without the payloads.
local function aged(keys, args)
  local time, ids = call('TIME'), {}
  local before = time[1] * 1000 + math.floor(time[2] / 1000) - integer(args[1], 'ms')
  if before < 0 then return ids end
  for _, entry in ipairs(call('XRANGE', keys[1], '-', string.format('%.0f', before), 'COUNT', 1000)) do
    ids[#ids + 1] = entry[1]
  end
  return ids
end

-- Over maxmemory the run must still drain, so all but those that add payload or leases may write.
local function register(name, callback, flags)
  redis.register_function({ function_name = 'slipstream2_' .. name, callback = callback, flags = flags })
end
register('join', join, { 'allow-oom' })
register('feed', feed)
register('requeue', requeue)
register('admit', admit)
register('heartbeat', heartbeat, { 'allow-oom' })
register('publish', publish)
register('drop', drop, { 'allow-oom' })
register('assign', assign, { 'allow-oom' })
register('strike', strike, { 'allow-oom' })
register('commit', commit, { 'allow-oom' })
register('applied', applied, { 'allow-oom' })
register('reconcile', reconcile, { 'allow-oom' })
register('fork', fork, { 'allow-oom' })
register('leave', leave, { 'allow-oom' })
register('snapshot', snapshot, { 'no-writes', 'allow-oom' })
register('aged', aged, { 'no-writes', 'allow-oom' })

-- What the Redis store does atomically: one call is one step of one session.
--
-- Keys of a session (all in one hash slot):
--   owner      hash: owner (a subject), node and fence (who may write it); never expires
--   head       hash: life, last_seq, trimmed_to, last_event_id, attempt, step, previous (the last attempt of
--              the gateway before this one's), record, running, touched_at, generation, position (a counter), expires ('1' while
--              the keys have a time to live)
--   events     stream: one entry per commit, id <life>-<seq of its last event>, field e = the packed events
--   queue      hash: <position>:<turn id> -> packed message
--   ledger     hash: <message id> -> <position>:<accepted at>:<turn id>
--   ages       sorted set: message ids by accepted at
--   decisions  hash: <call id> -> <position>:<decided at>:<decision>
--
-- A life is one unbroken numbering of events. Lives rise, over a loss of all data too (they are times), so
-- that stream ids rise for whoever reads along.
--
-- Numbers that may be large stay text wherever that is possible: Lua would write 1.7e+12.

local STORED, UNFINISHED, FINISHED, REPEATED = 0, 1, 2, 3
local UNKNOWN, GAP, LOST, AFTER, FENCED = -1, -2, -3, -4, -5

local function text(number)
  return string.format('%.0f', number)
end

local function new_life(former)
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  return text(math.max(now, tonumber(former or '0') + 1))
end

local function drop(keys)
  redis.call('DEL', keys[3], keys[4], keys[5], keys[6], keys[7])
end

-- The gateway process that made an attempt: its name and a dash.
local function process_of(attempt)
  return string.sub(attempt, 1, string.find(attempt, '-', 1, true))
end

local function is_unfinished(keys)
  return redis.call('HGET', keys[2], 'running') == '1' or redis.call('HLEN', keys[4]) > 0
end

-- What is accepted and not carried out yet must outlast every gateway; the rest may be forgotten in time.
local function set_expiry(keys, milliseconds)
  if is_unfinished(keys) then
    if redis.call('HGET', keys[2], 'expires') then
      redis.call('HDEL', keys[2], 'expires')
      for index = 2, 7 do redis.call('PERSIST', keys[index]) end
    end
    return UNFINISHED
  end
  redis.call('HSET', keys[2], 'expires', '1')
  for index = 2, 7 do redis.call('PEXPIRE', keys[index], milliseconds) end
  return FINISHED
end

local function take_position(head)
  return string.format('%016d', redis.call('HINCRBY', head, 'position', 1))
end

-- Keys: owner, head, events, and the other four when more than events changes.
-- Arguments: fencing number ('': without a lease), expected attempt ('': not known), attempt, step, first seq (0: no events), last seq,
-- trimmed to (0: nothing), 1 when there is a last event id, that id, the packed events; and if more changes:
-- 1 for a reset, 1 when there is a record, that record, 1 when it runs, touched at, generation, time to live
-- in ms, the oldest time the ledger keeps, then four lists, each after its number of items: queued (turn id,
-- message), dequeued (turn id), ledger (message id, turn id, accepted at), decisions (call id, decision, decided at).
local function commit(keys, args)
  local head_key, events_key = keys[2], keys[3]
  local owner = redis.call('HMGET', keys[1], 'owner', 'fence')
  if not owner[1] then return UNKNOWN end
  if args[1] ~= '' and args[1] ~= owner[2] then return FENCED end
  local head = redis.call(
    'HMGET', head_key, 'life', 'last_seq', 'trimmed_to', 'attempt', 'step', 'expires')
  local life, last_seq, attempt, step = head[1], head[2] or '0', head[4] or '-', tonumber(args[4])
  if attempt == args[3] then
    local done = tonumber(head[5])
    if step <= done then return REPEATED end
    if step ~= done + 1 then return AFTER end
  elseif step ~= 0 then
    return AFTER
  elseif args[2] ~= '' and args[2] ~= attempt then
    return LOST
  end
  local changes_more = args[11] ~= nil
  local is_reset = args[11] == '1'
  if is_reset then last_seq = '0' end
  if args[5] ~= '0' and tonumber(args[5]) ~= tonumber(last_seq) + 1 then return GAP end
  if attempt ~= args[3] and attempt ~= '-' and process_of(attempt) ~= process_of(args[3]) then
    redis.call('HSET', head_key, 'previous', attempt)
  end
  local trimmed_to = tonumber(head[3] or '0')
  if is_reset then
    drop(keys)
    life, trimmed_to = new_life(life), 0
    redis.call('HDEL', head_key, 'last_event_id')
    redis.call('HSET', head_key, 'life', life, 'trimmed_to', '0')
  elseif not life then
    life = new_life()
    redis.call('HSET', head_key, 'life', life, 'trimmed_to', '0')
  end
  if args[5] ~= '0' then
    last_seq = args[6]
    redis.call('XADD', events_key, life .. '-' .. last_seq, 'e', args[10])
    if head[6] and not changes_more then
      redis.call('PEXPIRE', events_key, redis.call('PTTL', head_key))
    end
  end
  redis.call('HSET', head_key, 'last_seq', last_seq, 'attempt', args[3], 'step', args[4])
  if args[8] == '1' then redis.call('HSET', head_key, 'last_event_id', args[9]) end
  local trim = math.min(tonumber(args[7]), tonumber(last_seq))
  if trim > trimmed_to then
    redis.call('HSET', head_key, 'trimmed_to', text(trim))
    if trim == tonumber(last_seq) then
      redis.call('DEL', events_key)
    else
      redis.call('XTRIM', events_key, 'MINID', '~', life .. '-' .. text(trim + 1))
    end
  end
  if not changes_more then return STORED end

  if args[12] == '1' then
    redis.call('HSET', head_key,
      'record', args[13], 'running', args[14], 'touched_at', args[15], 'generation', args[16])
  end
  local next_argument = 19
  local function items(fields, apply)
    local count = tonumber(args[next_argument])
    next_argument = next_argument + 1
    for _ = 1, count do
      apply(unpack(args, next_argument, next_argument + fields - 1))
      next_argument = next_argument + fields
    end
    return count
  end
  items(2, function(turn_id, message)
    redis.call('HSET', keys[4], take_position(head_key) .. ':' .. turn_id, message)
  end)
  items(1, function(turn_id)
    for _, field in ipairs(redis.call('HKEYS', keys[4])) do
      if string.sub(field, 18) == turn_id then redis.call('HDEL', keys[4], field) end
    end
  end)
  local remembered = items(3, function(message_id, turn_id, accepted_at)
    redis.call('HSET', keys[5], message_id,
      take_position(head_key) .. ':' .. accepted_at .. ':' .. turn_id)
    redis.call('ZADD', keys[6], accepted_at, message_id)
  end)
  if remembered > 0 then
    for _, message_id in ipairs(redis.call('ZRANGEBYSCORE', keys[6], '-inf', '(' .. args[18])) do
      redis.call('HDEL', keys[5], message_id)
      redis.call('ZREM', keys[6], message_id)
    end
  end
  items(3, function(call_id, decision, decided_at)
    redis.call('HSETNX', keys[7], call_id, take_position(head_key) .. ':' .. decided_at .. ':' .. decision)
  end)
  return set_expiry(keys, args[17])
end

-- Keys: owner. Arguments: the subject. Returns the owner.
local function claim(keys, args)
  local owner = redis.call('HGET', keys[1], 'owner')
  if not owner or (owner == '' and args[1] ~= '') then
    owner = args[1]
    redis.call('HSET', keys[1], 'owner', owner)
  end
  return owner
end

-- Keys: owner. Arguments: the node that asks, the fencing number that it found ('': none). Makes it the node of
-- the session unless somebody else was quicker. Returns node and fencing number.
local function acquire(keys, args)
  local found = redis.call('HMGET', keys[1], 'node', 'fence')
  local node, fence = found[1], found[2] or ''
  if node ~= args[1] and fence == args[2] then
    -- A time, so that numbers rise over a loss of all data too.
    local time = redis.call('TIME')
    local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
    node, fence = args[1], text(math.max(now, (tonumber(fence) or 0) + 1))
    redis.call('HSET', keys[1], 'node', node, 'fence', fence)
  end
  return {node or '', fence}
end

-- Keys: owner. Arguments: the node that lets go of the session. The fencing number stays, and rises.
local function release(keys, args)
  if redis.call('HGET', keys[1], 'node') ~= args[1] then return LOST end
  redis.call('HDEL', keys[1], 'node')
  return STORED
end

-- Keys: all of a session. Arguments: the time before which it must have been touched, the other nodes that
-- live. Returns 'dropped', 'held' when one of them has it, or when it was touched last, or '' when there is
-- nothing to drop.
local function expire(keys, args)
  local node = redis.call('HGET', keys[1], 'node')
  for index = 2, #args do
    if args[index] == node then return 'held' end
  end
  local touched_at = redis.call('HGET', keys[2], 'touched_at')
  if not touched_at then return '' end
  if tonumber(touched_at) >= tonumber(args[1]) then return touched_at end
  drop(keys)
  redis.call('DEL', keys[2])
  return 'dropped'
end

-- Keys: all of a session. Drops everything but its owner: it cannot be read.
local function forget(keys)
  drop(keys)
  return redis.call('DEL', keys[2])
end

-- Keys: all of a session. Arguments: the time to live in ms. It is in use, so it must not run out.
local function refresh(keys, args)
  if redis.call('HGET', keys[2], 'expires') then set_expiry(keys, args[1]) end
  return STORED
end

-- Keys: all of a session. Arguments: a record with a new epoch, the generation, the attempt it was read at, a
-- new attempt, the time to live in ms. Its past is in doubt: only its owner and its last seq stay, unless it
-- changed since it was read.
local function renew(keys, args)
  local head = redis.call('HMGET', keys[2], 'attempt', 'last_seq')
  if head[1] ~= args[3] then return LOST end
  drop(keys)
  redis.call('HDEL', keys[2], 'last_event_id')
  redis.call('HSET', keys[2], 'record', args[1], 'running', '0', 'generation', args[2],
    'attempt', args[4], 'step', '0', 'trimmed_to', head[2])
  return set_expiry(keys, args[5])
end

-- Keys: owner, head. Arguments: the last attempt of a gateway that was acknowledged, a new attempt, its fencing
-- number. Redis may have lost what was acknowledged: then the past of the session is in doubt, whoever has it
-- now. With the new attempt whatever follows from that past is refused, and who loads it begins a new epoch.
local function verify(keys, args)
  local head = redis.call('HMGET', keys[2], 'attempt', 'previous')
  local process = process_of(args[1])
  if not head[1] then
    -- Dropped by who had a right to, unless it is this gateway's or is not known at all.
    local owner = redis.call('HMGET', keys[1], 'owner', 'fence')
    if not owner[1] or args[3] == '' or owner[2] == args[3] then return LOST end
    return STORED
  end
  for index = 1, 2 do
    local attempt = head[index]
    if attempt and process_of(attempt) == process then
      local number = string.sub(attempt, #process + 1)
      if tonumber(number) >= tonumber(string.sub(args[1], #process + 1)) then return STORED end
      redis.call('HSET', keys[2], 'attempt', args[2], 'step', '0', 'previous', head[1], 'generation', '')
      return LOST
    end
  end
  -- Two others wrote it since.
  return STORED
end

-- Keys: all of a session. Whether a turn runs or messages wait.
local function unfinished(keys)
  if is_unfinished(keys) then return UNFINISHED end
  return FINISHED
end

-- Keys: the nodes. Arguments: a node, the lease in ms. It lives. Returns 1 when it was known to, and then all
-- nodes that live.
local function beat(keys, args)
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', '(' .. text(now - tonumber(args[2])))
  local lived = redis.call('ZSCORE', keys[1], args[1]) and 1 or 0
  redis.call('ZADD', keys[1], text(now), args[1])
  return {lived, unpack(redis.call('ZRANGE', keys[1], 0, -1))}
end

-- Keys: an index. Arguments: members, each with the score it had when it was found to be needless.
local function unmark(keys, args)
  local removed = 0
  for index = 1, #args, 2 do
    local score = redis.call('ZSCORE', keys[1], args[index])
    if score and tonumber(score) == tonumber(args[index + 1]) then
      removed = removed + redis.call('ZREM', keys[1], args[index])
    end
  end
  return removed
end

-- Keys: the generation. Arguments: the one that was known, a new one. Returns the one that holds.
local function doubt(keys, args)
  local current = redis.call('GET', keys[1])
  if not current or current == args[1] then
    redis.call('SET', keys[1], args[2])
    return args[2]
  end
  return current
end

redis.register_function('PREFIX_commit', commit)
redis.register_function('PREFIX_claim', claim)
redis.register_function('PREFIX_acquire', acquire)
redis.register_function('PREFIX_release', release)
redis.register_function('PREFIX_beat', beat)
redis.register_function('PREFIX_expire', expire)
redis.register_function('PREFIX_forget', forget)
redis.register_function('PREFIX_refresh', refresh)
redis.register_function('PREFIX_renew', renew)
redis.register_function('PREFIX_unfinished', unfinished)
redis.register_function('PREFIX_verify', verify)
redis.register_function('PREFIX_unmark', unmark)
redis.register_function('PREFIX_doubt', doubt)

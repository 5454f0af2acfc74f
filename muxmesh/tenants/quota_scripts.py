"""The Lua scripts of the quotas of one tenant. Each is one atomic change, by the clock of Redis.

Keys, all in one slot of a Redis Cluster:

1. ``quota``: hash with the levels of the token buckets (``requests``, ``tokens``), the time ``at`` which they are
   true, and ``mean_s``, the mean duration of recent requests. It expires when the buckets are full again.
2. ``open``: hash, id of an open reservation → tokens and owner.
3. ``owners``: sorted set of the routers that hold reservations, by the time at which they count as dead.
4. ``settled``: sorted set of ids that were settled, by the time until which they are kept. So a settlement or a
   renewal that arrives twice, or late, changes nothing.
5. ``usage``: hash with totals since the tenant was added. It expires when the tenant was idle for `KEEP_USAGE_S`.

**A reservation that is not in ``open`` is not charged**: it is added and charged in one script, and given back and
removed in one script. So a Redis that lost the last writes, in a failover or a restart, needs no more than the open
reservations again (`RENEW`), and nothing is charged twice.
"""

from __future__ import annotations

SETTLED_S = 600
"""How long the id of a settled reservation is kept: longer than any repetition of its settlement may take."""
KEEP_S = 3600
"""How long the state of an idle tenant is kept, or until its buckets are full again, if that is longer."""
KEEP_USAGE_S = 400 * 86_400
"""How long the totals of an idle tenant are kept."""

_PRELUDE = f"""
local quota, open, owners, settled, usage = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local at = tonumber(redis.call('HGET', quota, 'at') or '') or now
local elapsed = math.max(0, now - at)

local keep_usage_s = {KEEP_USAGE_S}

local function limit_of(text)
    return tonumber(text)
end

local function level_of(name, limit)
    if not limit then
        return nil
    end
    local level = tonumber(redis.call('HGET', quota, name) or '') or limit
    return math.min(limit, level + elapsed * limit / 60)
end

local function keep(requests, tokens, token_limit)
    local full_s = tokens and (token_limit - tokens) * 60 / token_limit or 0
    redis.call('HSET', quota, 'at', string.format('%.6f', now))
    for name, level in pairs({{requests = requests, tokens = tokens}}) do
        redis.call('HSET', quota, name, string.format('%.6f', level))
    end
    for _, key in ipairs({{quota, open, owners, settled}}) do
        redis.call('EXPIRE', key, math.ceil(math.max({KEEP_S}, full_s)))
    end
end

local function tokens_of(entry)
    return tonumber(string.match(entry, '^%d+')) or 0
end

-- Gives back what routers hold that have not renewed it in time. Returns its tokens and the number of reservations.
local function given_back()
    redis.call('ZREMRANGEBYSCORE', settled, '-inf', now)
    local dead = redis.call('ZRANGEBYSCORE', owners, '-inf', now)
    if #dead == 0 then
        return 0, 0
    end
    local is_dead = {{}}
    for _, owner in ipairs(dead) do
        is_dead[owner] = true
    end
    redis.call('ZREMRANGEBYSCORE', owners, '-inf', now)
    local sum, count, entries = 0, 0, redis.call('HGETALL', open)
    for index = 1, #entries, 2 do
        if is_dead[string.match(entries[index + 1], ' (.*)$')] then
            redis.call('HDEL', open, entries[index])
            sum, count = sum + tokens_of(entries[index + 1]), count + 1
        end
    end
    return sum, count
end

local function capped(level, limit)
    return level and math.min(limit, level)
end
"""

RESERVE = (
    _PRELUDE
    + """
local owner, ttl, tokens = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local request_limit, token_limit, max_open = limit_of(ARGV[4]), limit_of(ARGV[5]), limit_of(ARGV[6])
local is_ahead = ARGV[7] == '1'
local back, num_back = given_back()
local request_level, token_level = level_of('requests', request_limit), level_of('tokens', token_limit)
request_level = request_level and capped(request_level + num_back, request_limit)
token_level = token_level and capped(token_level + back, token_limit)
local function refuse(name, wait, left, needed)
    keep(request_level, token_level, token_limit)
    if not is_ahead then
        redis.call('HINCRBY', usage, 'refused', 1)
        redis.call('EXPIRE', usage, keep_usage_s)
    end
    return {0, name, string.format('%.6f', wait), math.floor(left), needed}
end
local ids = {}
for index = 8, #ARGV do
    if redis.call('HEXISTS', open, ARGV[index]) == 0 and not redis.call('ZSCORE', settled, ARGV[index]) then
        ids[#ids + 1] = ARGV[index]
    end
end
if #ids > 0 then
    local num_open = redis.call('HLEN', open)
    if max_open and num_open + #ids > max_open then
        local mean = tonumber(redis.call('HGET', quota, 'mean_s') or '') or 1
        return refuse('max_concurrent_requests', mean / max_open, 0, #ids)
    end
    if request_level and request_level < #ids then
        return refuse('requests_per_minute', (#ids - request_level) * 60 / request_limit, request_level, #ids)
    end
    local needed = token_limit and math.min(tokens * #ids, token_limit)
    if token_level and token_level < needed then
        return refuse('tokens_per_minute', (needed - token_level) * 60 / token_limit, token_level, needed)
    end
    request_level = request_level and request_level - #ids
    token_level = token_level and token_level - tokens * #ids
    for _, id in ipairs(ids) do
        redis.call('HSET', open, id, string.format('%d %s', tokens, owner))
    end
end
redis.call('ZADD', owners, now + ttl, owner)
keep(request_level, token_level, token_limit)
local num_owners = redis.call('ZCARD', owners)
return {1, string.format('%.6f', request_level or 0), string.format('%.6f', token_level or 0), num_owners}
"""
)
"""Arguments: owner, its TTL in s, tokens of each reservation, the limits on requests, tokens and open reservations,
whether it is ahead of requests (1), then the ids: all of them are reserved, or none.

An empty limit is none. A reservation that was settled already, as its router did not wait for it, is not made. Returns
1 with the levels of the buckets of requests and tokens and the number of routers with reservations; or 0 with the
exceeded limit, seconds until it would be granted, what is left of it and what is needed. More tokens than the bucket
holds are granted when it is full; its level is negative then. A refusal ahead of requests is not counted.
"""

RELEASE = (
    _PRELUDE
    + f"""
local request_limit, token_limit = limit_of(ARGV[1]), limit_of(ARGV[2])
local change, num_released = given_back()
for index = 3, #ARGV, 2 do
    local id, kept = ARGV[index], tonumber(ARGV[index + 1])
    local entry = redis.call('HGET', open, id)
    if entry and kept > 0 then
        redis.call('HSET', open, id, string.format('%d %s', kept, string.match(entry, ' (.*)$')))
        change = change + tokens_of(entry) - kept
    elseif entry then
        redis.call('HDEL', open, id)
        change = change + tokens_of(entry)
        num_released = num_released + 1
    end
    if kept == 0 then
        redis.call('ZADD', settled, now + {SETTLED_S}, id)
    end
end
local request_level, token_level = level_of('requests', request_limit), level_of('tokens', token_limit)
keep(request_level and capped(request_level + num_released, request_limit),
     token_level and capped(token_level + change, token_limit), token_limit)
return 1
"""
)
"""Arguments: limits on requests and tokens, then ids of reservations and the tokens that each of them keeps.

The rest is given back; with 0 the whole reservation, which no request has used.
"""

SETTLE = (
    _PRELUDE
    + f"""
local request_limit, token_limit = limit_of(ARGV[1]), limit_of(ARGV[2])
local change, num_back = given_back()
local request_level, token_level = level_of('requests', request_limit), level_of('tokens', token_limit)
request_level = request_level and capped(request_level + num_back, request_limit)
local mean = tonumber(redis.call('HGET', quota, 'mean_s') or '')
local requests, prompts, outputs = 0, 0, 0
for index = 3, #ARGV, 4 do
    local id, seconds = ARGV[index], tonumber(ARGV[index + 3])
    local prompt, output = tonumber(ARGV[index + 1]), tonumber(ARGV[index + 2])
    local entry = redis.call('HGET', open, id)
    if entry or not redis.call('ZSCORE', settled, id) then
        change = change - prompt - output
        if entry then
            redis.call('HDEL', open, id)
            change = change + tokens_of(entry)
        elseif request_level and prompt > 0 then
            request_level = request_level - 1
        end
        if entry or prompt + output > 0 then
            requests, prompts, outputs = requests + 1, prompts + prompt, outputs + output
            mean = mean and mean + 0.1 * (seconds - mean) or seconds
        end
    end
    redis.call('ZADD', settled, now + {SETTLED_S}, id)
end
if requests > 0 then
    redis.call('HINCRBY', usage, 'requests', requests)
    redis.call('HINCRBY', usage, 'prompt_tokens', prompts)
    redis.call('HINCRBY', usage, 'output_tokens', outputs)
    redis.call('HSET', usage, 'last_used_unix_s', string.format('%.3f', now))
    redis.call('EXPIRE', usage, {KEEP_USAGE_S})
    redis.call('HSET', quota, 'mean_s', string.format('%.6f', mean))
end
keep(request_level, token_level and capped(token_level + change, token_limit), token_limit)
return 1
"""
)
"""Arguments: limits on requests and tokens; then of each settlement id, prompt tokens, output tokens, duration in s.

Charges what was used and gives the reservation back. One that was never made is charged as well: a router grants
requests itself while Redis is away.
"""

RENEW = (
    _PRELUDE
    + """
local owner, ttl, request_limit, token_limit = ARGV[1], tonumber(ARGV[2]), limit_of(ARGV[3]), limit_of(ARGV[4])
local next_number = tonumber(ARGV[5])
redis.call('ZREM', owners, owner)
local change, num_removed = given_back()
local num_added, is_listed = 0, {}
redis.call('ZADD', owners, now + ttl, owner)
for index = 6, #ARGV, 2 do
    local id, tokens = ARGV[index], tonumber(ARGV[index + 1])
    is_listed[id] = true
    if redis.call('HEXISTS', open, id) == 0 and not redis.call('ZSCORE', settled, id) then
        redis.call('HSET', open, id, string.format('%d %s', tokens, owner))
        change = change - tokens
        num_added = num_added + 1
    end
end
local entries = redis.call('HGETALL', open)
for index = 1, #entries, 2 do
    local id, entry = entries[index], entries[index + 1]
    local is_older = tonumber(string.match(id, '(%d+)$')) < next_number
    if string.match(entry, ' (.*)$') == owner and is_older and not is_listed[id] then
        redis.call('HDEL', open, id)
        change = change + tokens_of(entry)
        num_removed = num_removed + 1
    end
end
local request_level, token_level = level_of('requests', request_limit), level_of('tokens', token_limit)
request_level = request_level and capped(request_level - num_added + num_removed, request_limit)
keep(request_level, token_level and capped(token_level + change, token_limit), token_limit)
return {num_added, redis.call('ZCARD', owners)}
"""
)
"""Arguments: owner, its TTL in s, limits on requests and tokens, the number that the owner's next id will end with,
then id and tokens of each of its open reservations.

Adds and charges those that Redis has lost, and gives back older ones of the owner that are not listed: a failover lost
their settlement, or it is on its way, and then charges their request again. Returns the number of those that were lost,
and that of the routers with reservations.
"""

READ = (
    _PRELUDE
    + """
local request_limit, token_limit = limit_of(ARGV[1]), limit_of(ARGV[2])
local back, num_back = given_back()
local request_level, token_level = level_of('requests', request_limit), level_of('tokens', token_limit)
request_level = request_level and capped(request_level + num_back, request_limit)
token_level = token_level and capped(token_level + back, token_limit)
if num_back > 0 then
    keep(request_level, token_level, token_limit)
end
local function text(level)
    return level and string.format('%.6f', level) or ''
end
local entries, reserved = redis.call('HVALS', open), 0
for _, entry in ipairs(entries) do
    reserved = reserved + tokens_of(entry)
end
return {text(request_level), text(token_level), #entries, reserved,
        redis.call('HGETALL', usage)}
"""
)
"""Arguments: limits on requests and tokens. Returns the levels, open reservations, their tokens, and the totals."""

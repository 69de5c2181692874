-- What is the same for many requests is stored once, and a request is a row of numbers, in order of time: its only
-- index is the one that keeps it unique. What was written before stays in `requests` until it is forgotten, so that
-- this takes no time, and a gateway of an older version can still write there.

CREATE TABLE usage_kinds (
    id BIGINT PRIMARY KEY, -- a hash of the rest
    key_id TEXT NOT NULL,
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    route TEXT NOT NULL,
    outcome TEXT NOT NULL,
    safety TEXT NOT NULL
);

-- `number` counts the requests of one gateway's life, which `gateway` names. status: 0 while it runs.
CREATE TABLE usage_rows (
    started_at BIGINT NOT NULL,
    gateway BIGINT NOT NULL,
    number BIGINT NOT NULL,
    kind BIGINT NOT NULL,
    request_id TEXT NOT NULL,
    status BIGINT NOT NULL,
    duration_us BIGINT NOT NULL,
    first_token_us BIGINT,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    replays BIGINT NOT NULL,
    PRIMARY KEY (started_at, gateway, number)
);

CREATE VIEW all_usage AS
SELECT started_at, request_id, key_id, tenant, model, route, outcome, safety, status, duration_us, first_token_us,
    prompt_tokens, cached_tokens, output_tokens, replays
FROM usage_rows JOIN usage_kinds ON usage_kinds.id = usage_rows.kind
UNION ALL
SELECT started_at, request_id, key_id, tenant, model, route, outcome, safety, status, duration_us, first_token_us,
    prompt_tokens, cached_tokens, output_tokens, replays
FROM requests;

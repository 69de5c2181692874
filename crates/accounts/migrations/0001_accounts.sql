-- For SQLite and PostgreSQL alike: integers are BIGINT, times are Unix milliseconds, lists are JSON text.

CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,
    secret_sha256 TEXT NOT NULL UNIQUE,
    shown TEXT NOT NULL,
    name TEXT NOT NULL,
    tenant TEXT NOT NULL,
    class TEXT NOT NULL,
    weight BIGINT NOT NULL,
    models TEXT,
    concurrency BIGINT,
    requests_per_minute BIGINT,
    tokens_per_minute BIGINT,
    tokens_per_day BIGINT,
    tokens_per_month BIGINT,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT
);

-- charged = what was used for good + what the leases of this window hold.
CREATE TABLE budgets (
    key_id TEXT NOT NULL,
    quota TEXT NOT NULL,
    window_start BIGINT NOT NULL,
    charged BIGINT NOT NULL,
    PRIMARY KEY (key_id, quota, window_start)
);

CREATE INDEX budgets_by_window ON budgets (window_start);

CREATE TABLE leases (
    key_id TEXT NOT NULL,
    quota TEXT NOT NULL,
    window_start BIGINT NOT NULL,
    gateway TEXT NOT NULL,
    granted BIGINT NOT NULL,
    held BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    PRIMARY KEY (key_id, quota, window_start, gateway)
);

CREATE INDEX leases_by_expiry ON leases (expires_at);

CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    request_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    route TEXT NOT NULL,
    started_at BIGINT NOT NULL,
    duration_us BIGINT NOT NULL,
    first_token_us BIGINT,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    status BIGINT NOT NULL,
    outcome TEXT NOT NULL
);

CREATE INDEX requests_by_time ON requests (started_at);
CREATE INDEX requests_by_key ON requests (key_id, started_at);

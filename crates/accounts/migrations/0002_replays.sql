-- How often a choice of the request went on after its replica's death.

ALTER TABLE requests ADD COLUMN replays BIGINT NOT NULL DEFAULT 0;

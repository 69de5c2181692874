-- What the model's safety hooks did to a request, as ACTION:HOOK.

ALTER TABLE requests ADD COLUMN safety TEXT NOT NULL DEFAULT '';

BEGIN TRANSACTION;
CREATE TABLE about (
	schema INTEGER NOT NULL
);
INSERT INTO "about" VALUES(1);
CREATE TABLE comparisons (
	id INTEGER NOT NULL, 
	prompt VARCHAR(16) NOT NULL, 
	first VARCHAR(16) NOT NULL, 
	second VARCHAR(16) NOT NULL, 
	origin TEXT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (first, second, origin), 
	FOREIGN KEY(prompt) REFERENCES prompts (id), 
	FOREIGN KEY(first) REFERENCES completions (id), 
	FOREIGN KEY(second) REFERENCES completions (id)
);
INSERT INTO "comparisons" VALUES(1,'da3506d6973c1e35','c751d1520d2e3e02','c18817f07364e526','batch 1');
CREATE TABLE completions (
	id VARCHAR(16) NOT NULL, 
	prompt VARCHAR(16) NOT NULL, 
	text TEXT NOT NULL, 
	stop VARCHAR(8) NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(prompt) REFERENCES prompts (id)
);
INSERT INTO "completions" VALUES('c751d1520d2e3e02','da3506d6973c1e35','four','eos');
INSERT INTO "completions" VALUES('c18817f07364e526','da3506d6973c1e35','five or so','length');
CREATE TABLE preferences (
	id INTEGER NOT NULL, 
	comparison INTEGER NOT NULL, 
	p FLOAT NOT NULL, 
	strength FLOAT, 
	tie BOOLEAN NOT NULL, 
	both_bad BOOLEAN NOT NULL, 
	rater TEXT NOT NULL, 
	kind VARCHAR(10) NOT NULL, 
	time VARCHAR(32) NOT NULL, 
	note TEXT NOT NULL, 
	meta JSON NOT NULL, 
	supersedes INTEGER, 
	PRIMARY KEY (id), 
	FOREIGN KEY(comparison) REFERENCES comparisons (id), 
	UNIQUE (supersedes), 
	FOREIGN KEY(supersedes) REFERENCES preferences (id)
);
INSERT INTO "preferences" VALUES(1,1,0.8,0.5,0,0,'ann','human','2026-01-02T03:04:05+00:00','sure','{}',NULL);
INSERT INTO "preferences" VALUES(2,1,0.1,0.5,0,0,'ann','human','2026-01-02T03:04:05+00:00','sure','{}',1);
INSERT INTO "preferences" VALUES(3,1,0.5,0.5,1,0,'bob','human','2026-01-02T03:04:05+00:00','sure','{}',NULL);
CREATE TABLE prompts (
	id VARCHAR(16) NOT NULL, 
	messages JSON NOT NULL, 
	meta JSON NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "prompts" VALUES('da3506d6973c1e35','[{"role": "user", "content": "2 + 2?"}]','{"category": "sums"}');
CREATE INDEX ix_preferences_comparison ON preferences (comparison);
CREATE TRIGGER prompts_no_update BEFORE UPDATE ON prompts BEGIN SELECT RAISE(ABORT, 'prompts are appended, never edited'); END;
CREATE TRIGGER prompts_no_delete BEFORE DELETE ON prompts BEGIN SELECT RAISE(ABORT, 'prompts are appended, never edited'); END;
CREATE TRIGGER completions_no_update BEFORE UPDATE ON completions BEGIN SELECT RAISE(ABORT, 'completions are appended, never edited'); END;
CREATE TRIGGER completions_no_delete BEFORE DELETE ON completions BEGIN SELECT RAISE(ABORT, 'completions are appended, never edited'); END;
CREATE TRIGGER comparisons_no_update BEFORE UPDATE ON comparisons BEGIN SELECT RAISE(ABORT, 'comparisons are appended, never edited'); END;
CREATE TRIGGER comparisons_no_delete BEFORE DELETE ON comparisons BEGIN SELECT RAISE(ABORT, 'comparisons are appended, never edited'); END;
CREATE TRIGGER preferences_no_update BEFORE UPDATE ON preferences BEGIN SELECT RAISE(ABORT, 'preferences are appended, never edited'); END;
CREATE TRIGGER preferences_no_delete BEFORE DELETE ON preferences BEGIN SELECT RAISE(ABORT, 'preferences are appended, never edited'); END;
COMMIT;

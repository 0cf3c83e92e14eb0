"""`Store`: finished trials in one SQLite file that survives kills, full disks and a second run beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from .trial import Outcome, Trial

SCHEMA_VERSION = 2

_metadata = MetaData()
_meta = Table("meta", _metadata, Column("name", String, primary_key=True), Column("value", String, nullable=False))
_trials = Table(
    "trials",
    _metadata,
    Column("key", String, primary_key=True),
    Column("study", String, nullable=False, index=True),
    Column("arm", String, nullable=False),
    Column("scale", String, nullable=False),
    Column("phase", String, nullable=False),
    Column("settings", String, nullable=False),
    Column("seed", Integer, nullable=False),
    Column("fingerprint", String, nullable=False),
    Column("status", String, nullable=False),
    Column("result", String, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("peak_memory", Integer),
    Column("error", String),
    Column("attempts", Integer, nullable=False, server_default="1"),
    Column("commit", String),
)


def _to_version_2(connection: Connection) -> None:
    """Version 1 knew neither how often a trial was tried nor the commit."""
    connection.execute(text("ALTER TABLE trials ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1"))
    connection.execute(text('ALTER TABLE trials ADD COLUMN "commit" VARCHAR'))


_MIGRATIONS: dict[int, Callable[[Connection], None]] = {1: _to_version_2}


class StoreError(RuntimeError):
    """The store cannot be read or written; what it holds is safe."""


class Store:
    """Outcomes of trials, written by the driver alone, each committed at once.

    Args:
        path: SQLite file; created with its folder if absent, brought up to date if written by an older version.

    Raises:
        StoreError: if the file is no store, was written by a newer version, or the disk is full.

    Example:
        >>> import tempfile
        >>> store = Store(Path(tempfile.mkdtemp()) / "trials.sqlite")
        >>> trial = Trial("digits", "plain", "smoke", "tune", {"lr": 0.1}, seed=0, fingerprint="f")
        >>> store.put(trial, Outcome("finished", {"score": 0.9})).metrics
        {'score': 0.9}
        >>> store.put(trial, Outcome("finished", {"score": 0.1})).metrics  # the first stays
        {'score': 0.9}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot create the folder of the store {self.path}: {error.strerror}") from error
        self._engine = create_engine(f"sqlite:///{self.path}", connect_args={"timeout": 60})
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(begin="IMMEDIATE")
        with self._translated(), self._writer.begin() as connection:
            self._migrate(connection)

    def get(self, trial: Trial) -> Outcome | None:
        """The outcome of a trial, or None."""
        with self._translated(), self._engine.connect() as connection:
            row = connection.execute(select(_trials).where(_trials.c.key == trial.key)).mappings().first()
        return None if row is None else _outcome(dict(row))

    def put(self, trial: Trial, outcome: Outcome) -> Outcome:
        """Keep an outcome, unless one that is done is there already.

        Returns:
            The outcome that the store now holds: of two runs side by side, both report the one that came first.
        """
        row = _row(trial, outcome)
        with self._translated(), self._writer.begin() as connection:
            known = connection.execute(select(_trials).where(_trials.c.key == trial.key)).mappings().first()
            if known is None:
                connection.execute(insert(_trials).values(row))
            elif known["status"] == "failed":
                connection.execute(update(_trials).where(_trials.c.key == trial.key).values(row))
            else:
                return _outcome(dict(known))
        return outcome

    def outcomes(self, study: str | None = None, **where: Any) -> list[tuple[Trial, Outcome]]:
        """All trials with their outcomes, optionally of one study, arm, scale, phase, seed or fingerprint."""
        query = select(_trials).order_by(_trials.c.arm, _trials.c.seed, _trials.c.key)
        for name, value in {"study": study, **where}.items():
            if value is not None:
                query = query.where(_trials.c[name] == value)
        with self._translated(), self._engine.connect() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        return [(_trial(row), _outcome(row)) for row in rows]

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    def _migrate(self, connection: Connection) -> None:
        """Create the tables or bring them up to date: all of it or, after a kill, nothing."""
        tables = inspect(connection).get_table_names()
        if not tables:
            _metadata.create_all(connection)
            connection.execute(insert(_meta).values(name="schema_version", value=str(SCHEMA_VERSION)))
            return
        if "meta" not in tables or "trials" not in tables:
            raise StoreError(f"{self.path} is a database, but not a store of trials; choose another file")
        found = connection.execute(select(_meta.c.value).where(_meta.c.name == "schema_version")).scalar()
        if found is None or not found.isdecimal() or int(found) < 1:
            raise StoreError(f"{self.path} has no readable schema version (found {found!r}); choose another file")
        if int(found) > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer wellposed (schema {found}; this one reads up to "
                f"{SCHEMA_VERSION}); upgrade wellposed or choose another folder"
            )
        for old in range(int(found), SCHEMA_VERSION):
            _MIGRATIONS[old](connection)
        if int(found) != SCHEMA_VERSION:
            connection.execute(update(_meta).where(_meta.c.name == "schema_version").values(value=str(SCHEMA_VERSION)))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", error))
            if "is full" in cause or "disk I/O" in cause:
                message = f"the disk is full: {self.path} cannot grow. Finished trials are safe; free space and rerun"
            elif "not a database" in cause or "malformed" in cause:
                message = f"{self.path} is not a readable store ({cause}); move it away to start over"
            elif "unable to open" in cause or "readonly" in cause:
                message = f"cannot open the store {self.path} for writing ({cause})"
            else:
                message = f"the store {self.path} failed: {cause}"
            raise StoreError(message) from error


def _configure(connection: Any, _record: Any) -> None:
    # Left alone, Python's driver begins a transaction only at the first INSERT, and none around CREATE or ALTER.
    connection.isolation_level = None
    # Write-ahead logging lets a second run read while this one writes, and keeps every commit whole under a kill.
    for pragma in ("busy_timeout=60000", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # A writer takes its lock before it looks: what it saw is still so when it writes.
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('begin', 'DEFERRED')}")


def _row(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    result = {"metrics": outcome.metrics, "curves": outcome.curves, "artifacts": outcome.artifacts}
    return {
        "key": trial.key,
        "study": trial.study,
        "arm": trial.arm,
        "scale": trial.scale,
        "phase": trial.phase,
        "settings": json.dumps({name: _plain(value) for name, value in trial.settings.items()}, sort_keys=True),
        "seed": trial.seed,
        "fingerprint": trial.fingerprint,
        "status": outcome.status,
        "result": json.dumps(result),
        "seconds": outcome.seconds,
        "peak_memory": outcome.peak_memory,
        "error": outcome.error,
        "attempts": outcome.attempts,
        "commit": outcome.commit,
    }


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value  # NumPy's numbers


def _trial(row: dict[str, Any]) -> Trial:
    names = ("study", "arm", "scale", "phase", "seed", "fingerprint")
    return Trial(settings=json.loads(row["settings"]), **{name: row[name] for name in names})


def _outcome(row: dict[str, Any]) -> Outcome:
    names = ("status", "seconds", "peak_memory", "error", "attempts", "commit")
    return Outcome(**{name: row[name] for name in names}, **json.loads(row["result"]))

"""Queries for many values at once on the tables of an MLflow database.

MLflow's search has no condition `tag IN (...)`. Its client therefore needs a request for each
value, and the database reads all rows of the tag for each. The tables are those that MLflow's own
package declares. A server gives no access to them, so its client asks for one value at a time.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from mlflow.store.tracking.dbmodels.models import SqlLoggedModel, SqlLoggedModelTag, SqlTag
from sqlalchemy import Connection, NullPool, create_engine, select

T = TypeVar("T")
VALUES = 500  # of one condition; SQLite takes 32,766, older versions 999


def runs_with_tag(uri: str, key: str, values: Collection[str]) -> list[str]:
    """Return the ids of the runs whose tag `key` has one of the values, also of deleted runs."""
    found = list[str]()
    with _connected(uri) as connection:
        for some in chunks(values):
            condition = (SqlTag.key == key, SqlTag.value.in_(some))
            found += connection.scalars(select(SqlTag.run_uuid).where(*condition))
    return found


def logged_models(uri: str, ids: Collection[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """Return model id -> (name, tags)."""
    names, tags = dict[str, str](), dict[str, dict[str, str]]()
    model: Any = SqlLoggedModel  # MLflow's tables have no types
    tag: Any = SqlLoggedModelTag
    with _connected(uri) as connection:
        for some in chunks(ids):
            named = connection.execute(
                select(model.model_id, model.name).where(model.model_id.in_(some))
            )
            names |= {row[0]: row[1] for row in named}
            tagged = connection.execute(
                select(tag.model_id, tag.tag_key, tag.tag_value).where(tag.model_id.in_(some))
            )
            for one, key, value in tagged:
                tags.setdefault(one, {})[key] = value
    return {one: (name, tags.get(one, {})) for one, name in names.items()}


def chunks(values: Collection[T]) -> Iterator[Sequence[T]]:
    """Split the values into conditions of at most VALUES."""
    every = list(values)
    for start in range(0, len(every), VALUES):
        yield every[start : start + VALUES]


@contextmanager
def _connected(uri: str) -> Iterator[Connection]:
    engine = create_engine(uri, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()

"""Stored evaluations: the same file for the same evaluation, and the same figures again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bridgework.data.catalog import resolve
from bridgework.errors import DataError
from bridgework.evaluation import POPE, HeldOutLoss, Retrieval
from bridgework.evaluation import results as stored
from bridgework.inference.pipeline import Pipeline
from tests.inference.tiny import pipeline

SPECS = (
    Retrieval(dataset="synthetic:shapes", rows=6),
    HeldOutLoss(dataset="synthetic:shapes", rows=6),
    POPE(dataset="synthetic:shapes").tiny(),
)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_record_is_read_as_it_was_written(
    pipe: Pipeline, home: Path, tmp_path: Path, spec: HeldOutLoss
) -> None:
    result, record = stored.evaluate(spec, pipe, home, "abc")
    read = stored.read(stored.write(record, tmp_path))
    assert read.metrics == result.metrics and read.figures == record.figures
    assert replace(read, rows={}) == replace(record, rows={})
    assert list(read.rows) == list(record.rows)
    for name, rows in record.rows.items():
        assert (read.rows[name].keys, read.rows[name].clusters) == (rows.keys, rows.clusters)
        np.testing.assert_array_equal(read.rows[name].values, rows.values)
        np.testing.assert_array_equal(read.rows[name].weights, rows.weights)
        assert read.rows[name].mean == result.metrics[name]
    assert stored.assign_weights(tmp_path, "xyz") == [tmp_path / record.file_name]
    assert stored.read(tmp_path / record.file_name).weights == "xyz"


def test_an_evaluation_is_its_settings_and_its_data(home: Path) -> None:
    spec = HeldOutLoss(dataset="synthetic:shapes", rows=6)
    same = replace(spec, dataset=resolve("synthetic:shapes", home))
    others = [replace(spec, rows=7), replace(spec, dataset="synthetic:choices")]
    others += [replace(spec, name="mine")]
    assert stored.identity(same, home) == stored.identity(spec, home)
    assert len({stored.identity(one, home) for one in (spec, *others)}) == 4


def test_a_file_that_is_no_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a stored evaluation"):
        stored.read(tmp_path / "x.parquet")

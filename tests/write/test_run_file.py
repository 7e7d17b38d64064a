"""A record is read whole, whatever its version; of very large metrics, rows at even distances."""

import h5py
import numpy as np
from made_records import make_record

from hpcmoe.write import run_file
from hpcmoe.write.run_file import read_run_file


def test_metrics_and_values_come_back_as_they_were(tmp_path):
    metrics, values = read_run_file(make_record(tmp_path / "run.h5", layers=3, experts=4, points=5))
    steps, load, unit = metrics["experts/utilisation"]
    assert steps.tolist() == [1, 2, 3, 4, 5] and load.shape == (5, 3, 4) and unit == "U_e"
    assert values["problem/num_layers"] == 3 and "experts/utilisation/value" not in values


def test_scales_and_attributes_do_no_harm(tmp_path):
    path = make_record(tmp_path / "run.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = 1
        file["experts/layer"] = np.arange(2)
        file["experts/layer"].make_scale("layer")
        file["experts/utilisation/value"].dims[1].attach_scale(file["experts/layer"])
    metrics, values = read_run_file(path)
    assert len(metrics["experts/utilisation"].steps) == 12 and values["experts/layer"].tolist() == [0, 1]


def test_of_a_very_large_metric_rows_are_read_the_last_among_them(tmp_path, monkeypatch):
    path = make_record(tmp_path / "run.h5", points=40)
    whole = read_run_file(path)[0]["experts/utilisation"]
    monkeypatch.setattr(run_file, "_MOST_BYTES", whole.values.nbytes // 8)
    few = read_run_file(path)[0]["experts/utilisation"]
    assert len(few.steps) == 5 and few.steps[-1] == 40
    np.testing.assert_array_equal(few.values, whole.values[np.isin(whole.steps, few.steps)])

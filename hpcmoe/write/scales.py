"""Dimension scales of run.h5, as HDF5's own conventions have them: each axis has a name, and xarray finds it.

A scale is a dataset of an axis's coordinates that others point to by object references, in attributes. No reader of
this program follows one: a file from elsewhere may point wherever it likes.
"""

import h5py
import numpy as np

from hpcmoe.write.catalogue import find_entry


def describe_dataset(path: str, dataset: h5py.Dataset, unit: str, steps: h5py.Dataset | None = None) -> None:
    """Add to a dataset its unit, description and scales; steps: that of its first axis where it is a step's figure."""
    first = 0 if steps is None else 1
    entry = find_entry(path, dataset.ndim - first)
    dataset.attrs["unit"], dataset.attrs["description"] = unit, entry.about
    if steps is not None:
        steps.attrs["unit"], steps.attrs["description"] = "1", "number of the optimizer step, from 1"
        steps.make_scale("step")
        dataset.dims[0].attach_scale(steps)
    for axis, name in enumerate(entry.axes, first):
        dataset.dims[axis].attach_scale(require_scale(dataset.file, name, dataset.shape[axis]))


def require_scale(file: h5py.File, name: str, length: int) -> h5py.Dataset:
    """Return the scale /name of a length, 0, 1, 2 ...; another of the name, as after a resume on other ranks, stays."""
    while name in file and (not isinstance(file[name], h5py.Dataset) or file[name].shape != (length,)):
        name = f"{name}_of_{length}"
    if name not in file:
        scale = file.create_dataset(name, data=np.arange(length))
        scale.attrs["unit"], scale.attrs["description"] = "1", f"number of the {name.replace('_', ' ')}, from 0"
        scale.make_scale(name)
    return file[name]


def detach_scales(dataset: h5py.Dataset) -> None:
    """Make the scales forget a dataset that is to be deleted, or they would point to nothing."""
    for dimension in dataset.dims:
        for scale in dimension.values():
            dimension.detach_scale(scale)

"""Batches out of whatever a loader gives: the one place that says what is input and what is label.

Shapes: ``B`` batch, ``C`` classes, ``H W`` pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from offramp.data.arrays import ArrayBatches
from offramp.data.collate import collate
from offramp.data.images import Batches, make_loader
from offramp.data.labels import read_labels
from offramp.errors import DataError, InvalidArgumentError, ShapeError, reason
from offramp.measure.outputs import OUTPUTS, Outputs
from offramp.model.inputs import LABEL_NAMES, TakesInputs, Tensors, as_inputs, explained


class Labelled(TakesInputs, Protocol):
    """A network that says what it takes, and what its labels are."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None where nobody said it."""
        ...

    @property
    def outputs(self) -> Outputs:
        """Labels or maps."""
        ...


@runtime_checkable
class _MapStyle(Protocol):
    """Whatever gives samples by their number."""

    def __getitem__(self, index: int, /) -> Any: ...

    def __len__(self) -> int: ...


def read_batch(
    batch: object,
    network: Labelled | None = None,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensors, Tensor]:
    """Make a batch out of what a loader gave.

    A batch is a pair (inputs, labels), or a dict by the names that Hugging Face's data sets and
    processors use. What has one meaning is converted (see
    :func:`~offramp.data.labels.read_labels` and :func:`~offramp.model.inputs.as_inputs`),
    anything else is refused. Of three parts or more, the first is the input and the second the
    label, if the network takes one input and the others can be neither inputs, labels nor weights:
    names, numbers of samples.
    """
    given, labels = _split(batch, network)
    try:
        inputs = as_inputs(given, network, device=device)
    except InvalidArgumentError as error:
        raise DataError(str(error)) from error
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in inputs}
    if len(sizes) > 1 or not min(sizes):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise DataError(
            f"Expected a batch of at least one sample, batch axis first. Got inputs {shapes}."
        )
    labels_B = read_labels(
        labels,
        num_samples=min(sizes),
        num_classes=None if network is None else network.num_classes,
        outputs=_outputs(network),
    )
    return inputs, labels_B if device is None else labels_B.to(device)


@contextmanager
def explained_data(inputs: Tensors, network: TakesInputs) -> Iterator[None]:
    """Say in one line what torch raises where a network cannot take the inputs of a batch."""
    try:
        with explained(inputs, network.input_specs):
            yield
    except ShapeError as error:
        raise DataError(str(error)) from error


def _outputs(network: Labelled | None) -> tuple[Outputs, ...]:
    return OUTPUTS if network is None else (network.outputs,)


def _split(batch: object, network: Labelled | None) -> tuple[object, object]:
    """Inputs and labels of a batch, or of a sample, as they are."""
    if isinstance(batch, list) and batch and _are_samples(batch):
        batch = collate(batch)
    fields = getattr(batch, "_fields", ())  # of a named tuple
    if any(name in fields for name in LABEL_NAMES):
        batch = dict(zip(fields, batch, strict=True))  # type: ignore[call-overload]
    if isinstance(batch, Mapping):
        return _split_dict(batch, network)
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        inside = batch[0] if isinstance(batch, tuple | list) and batch else batch
        raise DataError(
            f"Expected batches of (inputs, labels), or dicts of them. Got {type(inside).__name__} "
            "without labels."
        )
    given, labels, *others = batch
    if others:
        _check_others(given, others, network)
    return given, labels


def _split_dict(batch: Mapping[Any, Any], network: Labelled | None) -> tuple[object, object]:
    inputs = () if network is None else [spec.name for spec in network.input_specs]
    own = chain.from_iterable(outputs.label_names for outputs in _outputs(network))
    names = [name for name in (*LABEL_NAMES, *own) if name in batch and name not in inputs]
    if len(names) != 1:
        raise DataError(
            f"Expected a dict with one entry of labels, such as 'labels' or 'label'. Got "
            f"{'several' if names else 'none'} among the keys {', '.join(map(repr, batch))}."
        )
    return {key: value for key, value in batch.items() if key != names[0]}, batch[names[0]]


def _check_others(given: object, others: Sequence[object], network: Labelled | None) -> None:
    """Refuse parts of a batch, beyond the second, that may mean something."""
    form = "give pairs (inputs, labels), with several inputs as a tuple or dict, or name all parts"
    if network is not None and (
        len(network.input_specs) > 1 or (network.ragged and network.ragged.pad_id is None)
    ):
        raise DataError(
            "Expected pairs (inputs, labels) for a network of several inputs. "
            f"Got {2 + len(others)} parts: {form} in a dict."
        )
    num_classes = None if network is None else network.num_classes
    for number, other in enumerate(others, start=3):
        if _may_matter(other, given, num_classes):
            raise DataError(
                f"Expected batches of (inputs, labels). Got {2 + len(others)} parts, of which part "
                f"{number} may be inputs, labels or weights: {form} in a dict."
            )


def _may_matter(part: object, given: object, num_classes: int | None) -> bool:
    """Tell if a part could be inputs, labels or weights; names and numbers of samples cannot."""
    if isinstance(part, list | tuple) and part and isinstance(part[0], int | float):
        part = np.asarray(part)
    if not isinstance(part, Tensor | np.ndarray) or part.ndim == 0 or not len(part):
        return False
    values = torch.as_tensor(part)
    if values.is_floating_point():
        return True
    if values.ndim > 1 and values.shape[1:].numel() > 1:
        return isinstance(given, Tensor) and not given.is_floating_point()
    # Samples have numbers of their own; classes, domains and flags come again.
    is_class = values >= 0 if num_classes is None else (values >= 0) & (values < num_classes)
    return bool(is_class.all()) and len(set(values.flatten().tolist())) < len(values)


def batches_of(data: object, *, batch_size: int = 256) -> Iterable[Any]:
    """Go through data a batch at a time."""
    if isinstance(data, DataLoader):
        return checked_loader(data)
    if isinstance(data, IterableDataset) or _is_iterator(data):
        return _grouped(iter(data), batch_size)  # type: ignore[call-overload]
    dataset = dataset_of(data)
    if isinstance(dataset, list | tuple) and not _are_samples(dataset[:1]):
        return dataset
    fits = isinstance(dataset, Batches | ArrayBatches)
    size = dataset.run_batch_size if fits else batch_size
    return make_loader(dataset, batch_size=size)


def dataset_of(data: object) -> Any:
    """Bring labelled data into the form of a data set, which gives samples by their number."""
    if isinstance(data, Tensor | np.ndarray):
        raise DataError(
            f"Expected samples with labels. Got one {type(data).__name__} of shape "
            f"{tuple(data.shape)}: give tensors (inputs, labels), or a data set of such pairs."
        )
    if isinstance(data, Mapping):
        return Rows(data)
    if isinstance(data, tuple | list) and len(data) > 1 and all(map(_is_column, data[1:])):
        return Rows(tuple(data))
    is_table = type(data).__module__.partition(".")[0] == "pandas"
    if isinstance(data, str | bytes) or is_table or not isinstance(data, _MapStyle):
        advice = ""
        if isinstance(data, IterableDataset):
            advice = ": wrap it in a DataLoader"
        elif isinstance(data, Iterator):
            advice = ": make a list of its samples"
        raise DataError(
            "Expected a DataLoader, a data set of (input, label) samples with a length, or tensors "
            f"(inputs, labels). Got {type(data).__name__}{advice}."
        )
    try:
        is_empty = len(data) == 0
    except (TypeError, NotImplementedError) as error:  # a chain of streams has none after all
        raise DataError(
            f"Expected a data set with a length. Got a {type(data).__name__} without one "
            f"({reason(error)}): wrap it in a DataLoader."
        ) from error
    if is_empty:
        raise DataError("Expected at least one sample. Got an empty data set.")
    return data


def samples_of(data: object) -> Any:
    """Bring labelled data into the form of a data set, as :func:`dataset_of`, of samples alone."""
    dataset = dataset_of(data)
    if isinstance(dataset, list | tuple) and not _are_samples(dataset[:1]):
        read_batch(dataset[0])  # says what is wrong with it, if it is no batch
        raise DataError(
            f"Expected samples, or a DataLoader. Got a {type(dataset).__name__} of batches: make "
            "one of samples, or wrap it in DataLoader(batches, batch_size=None)."
        )
    return dataset


class Rows(Dataset[Any]):
    """The rows of tensors, as samples."""

    def __init__(self, columns: Mapping[Any, Any] | tuple[Any, ...]) -> None:
        lengths = set(_lengths(columns))
        if len(lengths) != 1 or lengths == {0}:
            raise DataError(
                "Expected tensors of equal length, one row for each sample. "
                f"Got lengths {', '.join(map(str, sorted(lengths))) or 'of none'}."
            )
        self._columns = columns
        (self._length,) = lengths

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return _row(self._columns, index)


def _lengths(columns: object) -> Iterator[int]:
    if isinstance(columns, Mapping):
        for column in columns.values():
            yield from _lengths(column)
    elif isinstance(columns, tuple | list) and not _has_rows(columns):
        for column in columns:
            yield from _lengths(column)
    elif _has_rows(columns):
        yield len(columns)  # type: ignore[arg-type]
    else:
        raise DataError(
            f"Expected a dict or tuple of tensors. Got a {type(columns).__name__} in it: of "
            "several data sets, choose one."
        )


def _row(columns: Any, index: int) -> Any:
    if isinstance(columns, Mapping):
        return {key: _row(column, index) for key, column in columns.items()}
    if isinstance(columns, tuple | list) and not _has_rows(columns):
        return tuple(_row(column, index) for column in columns)
    return columns[index]


def _has_rows(values: object) -> bool:
    """Tell if something is a column, or lists of numbers for each of several samples."""
    if _is_column(values):
        return True
    return isinstance(values, list) and all(isinstance(v, list) and _has_rows(v) for v in values)


def _is_column(values: object) -> bool:
    """Tell if something has a number or name for each of several samples."""
    if isinstance(values, Tensor | np.ndarray):
        return values.ndim > 0
    return isinstance(values, list) and all(
        isinstance(value, int | float | str | np.generic) for value in values
    )


def checked_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Make sure that a loader has batches; what torch's collate cannot stack stays a list."""
    is_counted = not isinstance(loader.dataset, IterableDataset)
    if is_counted and len(loader) == 0:
        raise DataError(
            f"Expected at least one batch. Got a loader of none: {_count(loader)} samples, "
            f"batch_size={loader.batch_size}, drop_last={loader.drop_last}."
        )
    if loader.collate_fn is not default_collate:
        return loader
    own = copy.copy(loader)
    own.collate_fn = collate
    own._iterator = None
    return own


def _count(loader: DataLoader[Any]) -> int:
    dataset = loader.dataset
    return len(dataset) if isinstance(dataset, _MapStyle) else 0


def _is_iterator(data: object) -> bool:
    return isinstance(data, Iterable) and not isinstance(data, _MapStyle | Mapping | Tensor)


def _grouped(items: Iterator[Any], batch_size: int) -> Iterator[Any]:
    """Batches as they come, or samples put together to batches."""
    first = list(islice(items, 1))
    items = chain(first, items)
    if not _are_samples(first):
        yield from items
        return
    while samples := list(islice(items, batch_size)):
        yield collate(samples)


def _are_samples(items: Sequence[Any]) -> bool:
    """Tell if each item is one sample: its label has no batch axis that its inputs share."""
    return bool(items) and all(map(_is_sample, items))


def _is_sample(item: object) -> bool:
    if not isinstance(item, Mapping | tuple | list):
        return False
    if not isinstance(item, Mapping) and any(map(_is_number, item[1:])):
        return True
    try:
        given, label = _split(tuple(item) if isinstance(item, list) else item, None)
    except DataError:
        return False
    if isinstance(label, Tensor | np.ndarray | list | tuple):
        shape = np.shape(label)
        return not shape or shape[0] != _first_size(given)
    return True


def _is_number(part: object) -> bool:
    return isinstance(part, int | float | Tensor | np.ndarray | np.generic) and np.ndim(part) == 0


def _first_size(given: object) -> int | None:
    """Size of the first axis of the first input."""
    if isinstance(given, Mapping):
        sizes = [_first_size(value) for value in given.values()]
        return next((size for size in sizes if size is not None), None)
    if isinstance(given, tuple | list) and given and isinstance(given[0], Tensor | np.ndarray):
        return _first_size(given[0])
    if isinstance(given, Tensor | np.ndarray):
        return given.shape[0] if given.ndim else None
    return len(given) if isinstance(given, list) else None

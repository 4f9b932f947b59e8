"""Questions about a loader, and refusals of what is none."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ant_jax._data.array_loader import ArrayLoader
from ant_jax._data.batches import MOST_ARRAYS, READ_AGAIN, BatchError
from ant_jax._trees import describe, describe_tree


def length_of(loader: Any) -> int | None:
    """Batches in an epoch of a loader; ``None`` when it cannot tell, or has no end."""
    length = _told_length(loader)
    return None if length == sys.maxsize else length


def _told_length(loader: Any) -> int | None:
    try:
        return len(loader)
    except Exception:  # whatever it raises, it cannot tell: NotImplementedError, a wrapper's AttributeError
        return None


def has_no_end(loader: Any) -> bool:
    """Whether a loader says that it has no end; one may have none without saying so.

    >>> has_no_end(itertools.cycle([1, 2])), has_no_end([1, 2])
    (True, False)
    """
    if isinstance(loader, itertools.repeat):
        return operator.length_hint(loader, -1) < 0
    # The length is how Grain tells that a data set repeats for ever.
    return isinstance(loader, itertools.cycle | itertools.count) or _told_length(loader) == sys.maxsize


def has_state(iterator: Any) -> bool:
    """Whether an iterator can tell where it is, and be put there, as Grain's can."""
    return all(callable(getattr(iterator, method, None)) for method in ("get_state", "set_state"))


def cannot_go_on(loader: Any, name: str) -> str:
    """Say that a loader cannot be put where a run goes on."""
    return (
        f"{name} is a {type(loader).__name__}, which can be read only once and cannot be put where the run goes on. "
        f"Pass an iterable that starts again for every epoch (a list, an ArrayLoader, a DataLoader), or an iterator "
        f"with get_state and set_state"
    )


def refuse_read_once(loader: Any, name: str) -> None:
    """Raise BatchError if a run that was saved cannot go on with a loader, since that is read only once."""
    if isinstance(loader, Iterator) and not has_state(loader):
        raise BatchError(cannot_go_on(loader, name))


def description_of(loader: Any) -> dict[str, Any]:
    """Describe a loader's data, as JSON, so that another one is noticed when a run goes on.

    An ``ArrayLoader`` by what fixes the order of its batches, by the form of its arrays, and by a checksum of 16
    examples; any other loader by its length, if it knows that.

    >>> description_of([1, 2, 3])
    {'batches': 3}
    """
    if isinstance(loader, ArrayLoader):
        return loader.description
    batches = length_of(loader)
    return {} if batches is None else {"batches": batches}


def refuse_bad_length(loader: Any, name: str, epochs: int, limit: int | None = None) -> None:
    """Raise BatchError if it can be told beforehand that a loader will run out of batches."""
    once = isinstance(loader, Generator) or type(loader).__module__ in ("builtins", "itertools")
    if once and limit is None and epochs > 1 and isinstance(loader, Iterator):
        raise BatchError(
            f"{name} is a {type(loader).__name__}, which can be read only once, and there are {epochs} epochs to go. "
            f"{READ_AGAIN}"
        )
    batches = length_of(loader)
    if limit is not None and batches is not None and batches < limit:
        raise BatchError(f"{name} has {batches} batches, fewer than steps_per_epoch={limit}")


def refuse_endless(loader: Any, name: str, argument: str) -> None:
    """Raise BatchError if a loader says that it has no end, and so an evaluation of all its batches would have none."""
    if has_no_end(loader):
        raise BatchError(f"{name} has no end, and so its evaluation would have none; give {argument}=, its batches")


def refuse_no_iterable(loader: Any, name: str) -> None:
    """Raise TypeError if a loader cannot be iterated over.

    >>> refuse_no_iterable(list, "train_loader")
    Traceback (most recent call last):
    TypeError: train_loader must be an iterable of batches, got <class 'list'>; make an instance of it
    """
    if not isinstance(loader, Iterable):
        hint = "; make an instance of it" if isinstance(loader, type) else "; call it" if callable(loader) else ""
        raise TypeError(f"{name} must be an iterable of batches, got {loader!r:.200}{hint}")


def refuse_arrays(loader: Any, name: str, pairs: bool) -> None:
    """Raise TypeError if arrays are given where a loader belongs, before their rows are taken for batches.

    Arrays are iterables, too, whose items may be meant as batches. So only what cannot be meant so is refused: several
    arrays of as many examples in different forms, one array where batches are pairs, a mapping, a table.

    Args:
        loader: to look at.
        name: what errors call it.
        pairs: whether batches must be ``(inputs, targets)``.
    """
    if isinstance(loader, Mapping):
        given = ", ".join(map(repr, loader))
        refused = not isinstance(loader, Iterator)
    elif _is_array(loader):
        given = describe(loader) if hasattr(loader, "dtype") else "columns"
        refused = pairs or hasattr(loader, "columns")  # a table's items are the names of its columns
    elif isinstance(loader, tuple | list) and 1 < len(loader) <= MOST_ARRAYS:
        given = ", ".join(map(_form_in_words, loader))
        refused = _lengths_agree(loader) and not _may_be_batches(loader)
    else:
        return
    if refused:
        arrays = "(X, Y)" if pairs or len(loader) == 2 else "arrays"
        raise TypeError(
            f"{name} must be an iterable of batches, got a {type(loader).__name__} of {given}. Arrays in memory become "
            f"one by ArrayLoader({arrays}, batch_size=32); a single batch goes into a list, [batch]"
        )


def _is_array(value: Any) -> bool:
    """Whether a value is an array, or what numpy takes for one: a tensor, a table, a column."""
    return hasattr(value, "__array__") and len(getattr(value, "shape", ())) > 0


def _is_list_of_numbers(value: Any) -> bool:
    innermost = value
    while isinstance(innermost, tuple | list) and innermost:
        innermost = innermost[0]
    return innermost is not value and isinstance(innermost, bool | int | float)


def _arrays_in(item: Any) -> list[Any]:
    return [item] if _is_list_of_numbers(item) else jax.tree.leaves(item)


def _form_in_words(item: Any) -> str:
    if _is_list_of_numbers(item):
        return f"a list of {len(item)}"
    return f"({describe_tree(item)})" if isinstance(item, tuple | list | Mapping) else describe(item)


def _lengths_agree(items: Sequence[Any]) -> bool:
    """Whether all arrays in the items have as many examples."""
    arrays = [array for item in items for array in _arrays_in(item)]
    if not arrays or not all(_is_array(array) or isinstance(array, tuple | list) for array in arrays):
        return False
    return len({len(array) for array in arrays}) == 1


def _may_be_batches(items: Sequence[Any]) -> bool:
    """Whether the items are trees of arrays each, or all of one form, as batches are."""
    if all(isinstance(item, tuple | list | Mapping) and not _is_list_of_numbers(item) for item in items):
        return True
    return len({_form_of(item) for item in items}) == 1


def _form_of(item: Any) -> Any:
    arrays = _arrays_in(item)
    dtypes = (getattr(array, "dtype", None) for array in arrays)
    canonical_dtypes = [jax.dtypes.canonicalize_dtype(t) if isinstance(t, np.dtype) else str(t) for t in dtypes]
    return jax.tree.structure(item), tuple(np.shape(array) for array in arrays), tuple(canonical_dtypes)

"""Pair the parameters of torch with the leaves of JAX: all of them, or none.

Two things are not seen in shapes, and wrong outputs would be all that shows them:

- *A Linear after a flatten.* Any Linear between one convolution and the next is doubtful if its inputs are a multiple
  of the channels and more, and no Linear in between gives them; see ``_doubtful_inputs``.
- *A transposed convolution.* That it is one is known only from the caller's ``transpose_kernel``, or from the name of
  the JAX module if it begins with ``ConvTranspose``. Under any other name, and without a word of the caller, one with
  as many channels in as out is taken for a convolution, and the conversion is **silently wrong**.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ant_jax._state.host_fields import StateMismatch
from ant_jax.interop._layouts import TORCH_NAMES, Layout, Misfit, is_convolution, is_linear, layout
from ant_jax.interop._report import left_over
from ant_jax.interop._requests import Request
from ant_jax.interop._sides import Entry, Leaf, Path, canonical
from ant_jax.interop._tensors import category


class Pair(NamedTuple):
    """A parameter of torch, the leaf of JAX that it belongs to, and the way between them."""

    entry: Entry
    leaf: Leaf
    layout: Layout


def pair(entries: list[Entry], leaves: list[Leaf], request: Request, function: str) -> list[Pair]:
    """Pair every parameter with the leaf at its path.

    Args:
        entries: torch's side.
        leaves: JAX's.
        request: what the caller says of them.
        function: the caller's name, for the message.

    Returns:
        The pairs, in torch's order.

    Raises:
        StateMismatch: something is left over, or does not fit; the message lists all of it.
        ValueError: a path in the request leads nowhere.
    """
    request.refuse_unknown(entries, leaves)
    matches, lines = _matches(entries, leaves, request)
    pairs = []
    for entry, leaf in matches:
        try:
            pairs.append(Pair(entry, leaf, _layout(entry, leaf, request)))
        except Misfit as misfit:
            lines.append(f"{entry.label} -> {leaf.label}: {misfit}")
    lines += _doubtful_inputs(pairs, request)
    lines += left_over([entry for entry in entries if request.counterpart(entry)], leaves, matches)
    if lines:
        raise StateMismatch(
            f"{function}: the torch model and the JAX model do not fit together; nothing was converted.\n"
            + "\n".join(lines)
        )
    return pairs


def _matches(entries: list[Entry], leaves: list[Leaf], request: Request) -> tuple[list[tuple[Entry, Leaf]], list[str]]:
    """Match entries and leaves by path alone, and say where two entries go to the same leaf."""
    by_own_name: dict[tuple[Path, str], list[Leaf]] = {leaf.place: [leaf] for leaf in leaves}
    by_torch_name: dict[tuple[Path, str], list[Leaf]] = {}
    for leaf in leaves:
        module, name = leaf.place
        by_torch_name.setdefault((module, TORCH_NAMES.get(name, name)), []).append(leaf)
    taken: dict[int, Entry] = {}
    matches, lines = [], []
    for entry in entries:
        path, is_given = request.counterpart(entry) or ((), False)
        found = (by_own_name if is_given else by_torch_name).get((canonical(path[:-1]), "".join(path[-1:])), [])
        leaf = next((leaf for leaf in found if leaf.position not in taken), None)
        if leaf is not None:
            taken[leaf.position] = entry
            matches.append((entry, leaf))
        elif found:
            matches.append((entry, found[0]))
            lines.append(f"{entry.label} -> {found[0].label}: {taken[found[0].position].label} goes there, too")
    return matches, lines


def _layout(entry: Entry, leaf: Leaf, request: Request) -> Layout:
    kinds = category(entry.value), category(leaf.value)
    if kinds[0] != kinds[1]:
        raise Misfit(f"torch's numbers are {kinds[0]}, JAX's {kinds[1]}")
    module = entry.path[:-1]
    # Where as many channels go in as come out, shapes cannot tell a convolution from a transposed one.
    is_transposed = leaf.module.rpartition("/")[2].startswith("ConvTranspose")
    if is_transposed and is_convolution(leaf.name, entry.shape) and module not in request.transpose_kernel:
        raise Misfit(
            f"{leaf.module} is a ConvTranspose; say with transpose_kernel={{{entry.module!r}: False}} whether it has "
            f"transpose_kernel=False, which is flax's default, or True"
        )
    is_weight = entry.path[-1] == "weight"
    return layout(
        entry.shape,
        leaf.name,
        leaf.shape,
        flattened=request.flattened.get(module) if is_weight else None,
        transpose_kernel=request.transpose_kernel.get(module) if is_weight else None,
    )


def _doubtful_inputs(pairs: list[Pair], request: Request) -> Iterator[str]:
    """Yield what is to be said of the Linears after a convolution, each of which may follow a flatten.

    The order is torch's. It is that in which modules are made, and nearly always that in which they are called. Up to
    the next convolution every Linear is looked at: two heads may read what is flattened, and the Linears of a
    squeeze-and-excite block may come before the one that does. An MLP's later Linears are told from these by what the
    Linears before them give, see ``_may_be_flattened``.
    """
    convolution, normalized = None, None
    flat, given = set[int](), set[int]()  # sizes of what is flattened after the convolution, and of what Linears give
    for entry, leaf, _ in pairs:
        if is_convolution(leaf.name, entry.shape):
            convolution, normalized, flat, given = entry, None, set(), set()
        elif leaf.name == "scale":
            # What a Linear gives is no image; else no second head could follow a normalized first one of that width.
            normalized = None if entry.shape in [(size,) for size in given] else entry
        elif is_linear(leaf.name, entry.shape) and convolution is not None:
            outputs, inputs = entry.shape
            channels = convolution.shape[1 if convolution.path[:-1] in request.transpose_kernel else 0]
            is_doubtful = _may_be_flattened(inputs, channels, flat, given) and not request.says_inputs_of(entry)
            if is_doubtful or request.flattened.get(entry.path[:-1]):
                yield from _doubts_of(entry, convolution, channels, normalized, request, is_doubtful)
                flat.add(inputs)
            given.add(outputs)


def _may_be_flattened(inputs: int, channels: int, flat: set[int], given: set[int]) -> bool:
    """Whether a Linear's inputs may be a flattened image of so many channels.

    Not if a Linear after the convolution gives them, alone (an MLP) or with others (a gated unit, attention's query,
    key and value in one) - unless the flattened image itself has that size: then nobody can know.
    """
    if inputs <= channels or inputs % channels:
        return False
    return inputs in flat or all(size % inputs for size in given)


def _doubts_of(
    linear: Entry, convolution: Entry, channels: int, normalized: Entry | None, request: Request, is_doubtful: bool
) -> Iterator[str]:
    inputs, module = linear.shape[1], linear.module
    flattened = request.flattened.get(linear.path[:-1])
    if is_doubtful:
        yield (
            f"{linear.label}: its {inputs} inputs are {inputs // channels} for each of the {channels} channels of "
            f"{convolution.module}. If torch flattens (C, H, W) to make them, JAX flattens (H, W, C), and they must be "
            f"reordered: flattened={{{module!r}: ({channels}, H, W)}}. If not, say so: flattened={{{module!r}: None}}"
        )
    if flattened and channels == flattened[-1] != flattened[0]:
        yield (
            f"{linear.label}: flattened={flattened} must be as torch has it, (C, H, W), and {convolution.module} "
            f"before it has {channels} channels"
        )
    if normalized is not None and normalized.shape == (inputs,):
        yield (
            f"{normalized.label}: it seems to normalize what is flattened, and is not reordered; let the JAX model "
            f"transpose to (C, H, W) before it flattens, and say flattened={{{module!r}: None}}"
        )

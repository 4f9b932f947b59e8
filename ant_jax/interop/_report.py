"""Say what is left over on either side of a conversion, and propose what could belong together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

from ant_jax.interop._layouts import TORCH_NAMES, Misfit, layout
from ant_jax.interop._sides import Entry, Leaf
from ant_jax.interop._tensors import memory


_Part = TypeVar("_Part", Entry, Leaf)

_LIMITS = {
    r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?": "recurrent layers (LSTM, GRU, RNN) are not converted: flax has a "
    "module for each of their gates",
    r"bias_[kv]": "MultiheadAttention with add_bias_kv=True is not converted: flax has no such layer",
    r"weight_[gvu]|weight_orig|original\d+": "weight norm and spectral norm are not converted: remove them from the "
    "torch model first (torch.nn.utils.remove_weight_norm, remove_spectral_norm, parametrize.remove_parametrizations)",
}


def left_over(entries: list[Entry], leaves: list[Leaf], matches: Sequence[tuple[Entry, Leaf]]) -> list[str]:
    """List what has no match: parameters of modules that have one, then modules that have none, side by side.

    Args:
        entries: torch's side, without what the caller leaves out.
        leaves: JAX's.
        matches: what belongs together.

    Returns:
        Lines of a message; none if nothing is left over.
    """
    matched_entries = {entry.path for entry, _ in matches}
    tied = {memory(entry.value) for entry, _ in matches} - {None}
    spare = [entry for entry in entries if entry.path not in matched_entries and memory(entry.value) not in tied]
    matched_leaves = {leaf.position for _, leaf in matches}
    empty = [leaf for leaf in leaves if leaf.position not in matched_leaves]
    if not spare and not empty:
        return []
    torch_modules, jax_modules = _by_module(spare), _by_module(empty)
    partners = {entry.module: leaf.module for entry, leaf in matches}
    origins = {leaf.module: entry.module for entry, leaf in matches}
    lines = list(_inside(torch_modules, partners, _by_module(leaves), "JAX"))
    lines += _inside(jax_modules, origins, _by_module(entries), "torch")
    for module in partners.keys() & torch_modules.keys():
        del torch_modules[module]
    for module in origins.keys() & jax_modules.keys():
        del jax_modules[module]
    lines += _side_by_side(torch_modules, jax_modules)
    lines += _remedies(spare, leaves)
    return lines + _proposal(torch_modules, jax_modules, {entry.path[:-1] for entry in entries})


def _by_module(parts: list[_Part]) -> dict[str, list[_Part]]:
    modules: dict[str, list[_Part]] = {}
    for part in parts:
        modules.setdefault(part.module, []).append(part)
    return modules


def _inside(
    spare: Mapping[str, list[Entry]] | Mapping[str, list[Leaf]],
    partners: Mapping[str, str],
    there: Mapping[str, list[Leaf]] | Mapping[str, list[Entry]],
    side: str,
) -> Iterator[str]:
    for module, partner in partners.items():
        for part in spare.get(module, []):
            names = ", ".join(map(_in_words, there[partner]))
            yield f"{part.label} {part.shape}: {partner or 'the root'} in {side} has nothing for it; it has {names}"


def _in_words(part: Entry | Leaf) -> str:
    return f"{part.path[-1] if isinstance(part, Entry) else part.name} {part.shape}"


def _side_by_side(torch_modules: Mapping[str, list[Entry]], jax_modules: Mapping[str, list[Leaf]]) -> list[str]:
    if not torch_modules and not jax_modules:
        return []
    left = [_line(module, parts) for module, parts in torch_modules.items()]
    right = [_line(module, jax_modules[module]) for module in sorted(jax_modules, key=_natural)]
    rows = [("torch modules left over", "JAX modules left over"), *zip_longest(left or ["none"], right or ["none"])]
    width = max(len(row[0] or "") for row in rows)
    return [f"{one or '':{width}} | {other or ''}".rstrip() for one, other in rows]


def _line(module: str, parts: list[Entry] | list[Leaf]) -> str:
    return f"{module or '(root)'}: {', '.join(map(_in_words, parts))}"


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort numbers in a path as numbers.

    >>> sorted(["Dense_10", "Dense_9", "Conv_0"], key=_natural)
    ['Conv_0', 'Dense_9', 'Dense_10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


def _remedies(spare: list[Entry], leaves: list[Leaf]) -> Iterator[str]:
    names = {entry.path[-1] for entry in spare}
    yield from (limit for pattern, limit in _LIMITS.items() if any(re.fullmatch(pattern, name) for name in names))
    if "running_mean" in names and not any(leaf.name == "mean" for leaf in leaves):
        yield "Running statistics are in the model state: give model_state, too."
    yield (
        "Say with names={torch path: JAX path} what belongs together (a path stands for all that is below it, too) and "
        "with names={torch path: None} what has no counterpart in JAX; to leave out what has none in torch, give the "
        "trees without it."
    )


def _proposal(
    torch_modules: Mapping[str, list[Entry]], jax_modules: Mapping[str, list[Leaf]], all_modules: set[tuple[str, ...]]
) -> list[str]:
    """Propose names for the modules that fit each other, the first that fits in the order of both sides."""
    free = sorted(jax_modules, key=_natural)
    lines = []
    for module, entries in torch_modules.items():
        own = entries[0].path[:-1]
        if any(other[: len(own)] == own != other for other in all_modules):
            continue  # a name for it would be one for all that is below it
        fitting = [other for other in sorted(jax_modules, key=_natural) if _fits(entries, jax_modules[other])]
        chosen = next((other for other in fitting if other in free), None)
        if chosen is not None:
            free.remove(chosen)
            others = [other for other in fitting if other != chosen]
            doubt = f"  # or {', '.join(others[:3])}{', ...' if others[3:] else ''}" if others else ""
            lines.append(f"    {module!r}: {chosen!r},{doubt}")
    if not lines:
        return []
    return ["By kind, shape and order these fit. Check them, for the order may be another:", "names={", *lines, "}"]


def _fits(entries: list[Entry], leaves: list[Leaf]) -> bool:
    by_torch_name = {TORCH_NAMES.get(leaf.name, leaf.name): leaf for leaf in leaves}
    if by_torch_name.keys() != {entry.path[-1] for entry in entries}:
        return False
    return all(_fits_leaf(entry, by_torch_name[entry.path[-1]]) for entry in entries)


def _fits_leaf(entry: Entry, leaf: Leaf) -> bool:
    for transpose_kernel in (None, False):
        try:
            layout(entry.shape, leaf.name, leaf.shape, transpose_kernel=transpose_kernel)
        except Misfit:
            continue
        return True
    return False

"""Take a trained torch model over to JAX, and bring it back.

Only parameters are converted: the JAX model is yours to write, with flax (linen or nnx) or as plain functions, layer by
layer as the torch model is. Nothing here imports torch: a state_dict is any mapping from names to tensors or arrays::

    from ant_jax.interop import torch as ant_torch

    state = trainer.init(example_batch)
    params, model_state = ant_torch.from_state_dict(torch_model.state_dict(), state.params, state.model_state)
    state = trainer.init(example_batch, params=params, model_state=model_state)
    ...
    back = ant_torch.to_state_dict(state.params, state.model_state, like=torch_model.state_dict())
    torch_model.load_state_dict(back)

The trap: a Linear after a flatten
    Torch flattens ``(C, H, W)``, and JAX ``(H, W, C)``. So the inputs of the Linear that follows come in another order:
    no shape differs, and **the outputs are silently wrong**. Give the shape that torch flattens:
    ``flattened={"fc1": (C, H, W)}``, and if two heads read it, for both. Forgetting it is an error where it can be
    detected: where a Linear comes after a convolution in the state_dict, and has a multiple of its channels as inputs.
    That holds for every Linear up to the next convolution, except where its inputs are what a Linear before it gives
    (as in an MLP) or a part of that (as in a gated unit), and are not as many as what is flattened. If nothing is
    flattened there, or the JAX model transposes to ``(C, H, W)`` itself, say so with ``flattened={"fc1": None}``, which
    holds for all that is below the path. It cannot be detected if the state_dict has the modules in another order than
    the model calls them, or a Linear in between happens to give as many. The reverse, a Linear whose outputs torch
    reshapes to ``(C, H, W)``, is neither detected nor converted: let the JAX model reshape them to ``(C, H, W)`` as
    well, and then transpose.

Which layouts are known
    The JAX leaf's own name decides:

    ==================  =============================================================================================
    ``kernel``, ``w``   ``weight``. That of a Linear, ``(out, in)``, becomes ``(in, out)``, or what attention has:
                        ``(in, heads, head_dim)`` or ``(heads, head_dim, out)``. That of a convolution, grouped or
                        not, ``(out, in, *spatial)``, becomes ``(*spatial, in, out)``; for a transposed one see below
    ``embedding``,      ``weight``, as it is
    ``scale``
    ``bias``, ``b``     ``bias``
    ``mean``, ``var``   ``running_mean``, ``running_var``
    ``negative_slope``  ``weight`` of a PReLU with one slope
    any other           the one of the same name, as it is; so ``weight`` keeps torch's layout, as Equinox has it
    ==================  =============================================================================================

    ``MultiheadAttention`` is seen as four Linear layers, ``query``, ``key``, ``value`` and ``out`` (``out_proj`` in
    ``names``), which is how flax's ``MultiHeadDotProductAttention`` and ``nnx.MultiHeadAttention`` have it.

    A transposed convolution looks like a convolution, and if it has as many channels in as out, shapes cannot tell them
    apart. So say what flax's ``ConvTranspose`` has: ``transpose_kernel={"up": False}``, flax's default, with which the
    kernel is reversed in space, or ``True``. Forgetting it is an error if the JAX module's name begins with
    ``ConvTranspose`` or the shapes differ. Under another name, with as many channels in as out, **the outputs are
    silently wrong**. Torch's ``padding=p, output_padding=o`` is ``(low, low + o)`` in flax, for each spatial axis, with
    ``low = d * (k - 1) - p`` for a kernel of size ``k`` and dilation ``d``.

What has equal parameters and yet other results
    Defaults of layers, which no conversion sees (torch 2.13, flax 0.12):

    - *Axes*: images are ``(N, C, H, W)`` in torch and ``(N, H, W, C)`` in flax, series ``(N, C, L)`` and ``(N, L, C)``.
      ``MultiheadAttention`` takes ``(L, N, C)`` unless ``batch_first=True``, flax's ``(N, L, C)``.
    - *Padding* of a convolution is 0 in torch, ``"SAME"`` in flax. With a stride, ``"SAME"`` pads unevenly: for torch's
      ``padding=1`` write ``padding=1`` in flax, too. The stride of ``max_pool`` and ``avg_pool`` is the window's size
      in torch, and 1 in flax.
    - *BatchNorm*: torch's ``momentum=0.1`` is the weight of the new batch, flax's ``momentum=0.99`` that of the old
      value: torch's 0.1 is flax's 0.9. Both have an epsilon of 1e-5. In training, torch adds the unbiased variance to
      ``running_var``, which is ``n / (n - 1)`` times flax's: evaluation is the same, training drifts apart.
    - *LayerNorm* and *GroupNorm* have an epsilon of 1e-5 in torch, 1e-6 in flax; *RMSNorm* that of the machine, 1.2e-7
      for float32, in torch, and 1e-6 in flax.
    - *GELU* is exact in torch; ``jax.nn.gelu`` is the tanh approximation unless ``approximate=False``.
    - *Dropout* means the same, and draws other masks.

Limits
    Not converted are recurrent layers, weight norm and spectral norm, ``MultiheadAttention(add_bias_kv=True)``, grouped
    transposed convolutions (flax has none), transposed convolutions whose JAX leaf is ``weight``, normalizations of
    what is flattened, a 1x1 convolution that is a Dense in JAX, and layers that JAX stacks in one array (``nn.scan``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ant_jax._state.host_fields import StateMismatch
from ant_jax._state.leaves import strong
from ant_jax._trees import PyTree
from ant_jax.interop._layouts import Shape
from ant_jax.interop._pairing import Pair, pair
from ant_jax.interop._requests import Request, request
from ant_jax.interop._sides import entries_of, leaves_of
from ant_jax.interop._tensors import as_like, as_numpy, is_array, memory


def from_state_dict(
    state_dict: Mapping[str, Any],
    params: PyTree,
    model_state: PyTree = None,
    *,
    names: Mapping[str, str | tuple[str | int, ...] | None] | None = None,
    flattened: Mapping[str, Shape | None] | None = None,
    transpose_kernel: Mapping[str, bool] | None = None,
) -> tuple[PyTree, PyTree]:
    """Fill a JAX model's parameters with those of a torch model.

    Modules are matched by path, never by order: ``layers.0.fc1`` belongs to ``layers_0/fc1`` or ``layers/0/fc1``, and
    ``names`` says what has another name in JAX. If anything is left over, the error lists both sides and proposes
    names. **A Linear after a flatten needs** ``flattened``; see :mod:`ant_jax.interop.torch`, which also says which
    layouts are known, and which layers have other defaults.

    Args:
        state_dict: ``model.state_dict()``: tensors, or arrays, by name.
        params: the parameters to replace, as ``trainer.init(...).params``: arrays or ``jax.ShapeDtypeStruct``. To fill
            a part of a model, give that part.
        model_state: the model state to replace, which holds the running statistics of batch norm; ``None``: there is
            none.
        names: the path in JAX (``"Block_0/fc1"``, or a tuple of keys) of a path in torch (``"layers.0.fc1"``). It holds
            for all that is below, unless a longer path says otherwise; ``""`` is the root, so ``{"module": ""}`` takes
            a prefix away. ``None`` leaves out what has no counterpart in JAX. A parameter's own path maps it to a leaf.
        flattened: what torch flattens, ``(C, *spatial)``, to make the inputs of a Linear, by the Linear's path.
        transpose_kernel: by the path of torch's transposed convolutions, what flax's ``ConvTranspose`` has there. Name
            every one: if it has as many channels in as out, and its name in JAX does not begin with ``ConvTranspose``,
            the conversion is **silently wrong** without it.

    Returns:
        ``(params, model_state)``, with the structure, shapes, dtypes and shardings of the templates: a float64 or
        bfloat16 of torch is converted to the template's dtype. ``model_state`` is ``None`` where it was. Nothing shares
        memory with the torch model.

    Raises:
        StateMismatch: parameters are missing, left over or of another shape; the message names all of them.
        ValueError: a path is in neither model.
        TypeError: an argument is of the wrong type.

    >>> weights = {"net.fc.weight": np.arange(6.0).reshape(2, 3), "net.fc.bias": np.zeros(2)}
    >>> template = {"Dense_0": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    >>> params, _ = from_state_dict(weights, template, names={"net.fc": "Dense_0"})
    >>> params["Dense_0"]["kernel"]
    array([[0., 3.],
           [1., 4.],
           [2., 5.]], dtype=float32)
    """
    asked = request(names, flattened, transpose_kernel)
    pairs = _pairs("from_state_dict", "state_dict", state_dict, params, model_state, asked)
    leaves, structure = jax.tree.flatten((params, model_state))
    for entry, leaf, layout in pairs:
        leaves[leaf.position] = _placed(layout.to_jax(as_numpy(entry.value)[entry.rows]), leaf.value)
    return jax.tree.unflatten(structure, leaves)


def to_state_dict(
    params: PyTree,
    model_state: PyTree = None,
    *,
    like: Mapping[str, Any],
    names: Mapping[str, str | tuple[str | int, ...] | None] | None = None,
    flattened: Mapping[str, Shape | None] | None = None,
    transpose_kernel: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Make a torch model's state_dict of a JAX model's parameters: the reverse of :func:`from_state_dict`.

    Args:
        params: the parameters, as ``state.params``.
        model_state: the model state, as ``state.model_state``; ``None``: there is none.
        like: the state_dict of the torch model that is to take the parameters over.
        names: as :func:`from_state_dict` takes it.
        flattened: as :func:`from_state_dict` takes it.
        transpose_kernel: as :func:`from_state_dict` takes it.

    Returns:
        A state_dict with the names, order, shapes, dtypes and devices of ``like``, for ``model.load_state_dict(...)``:
        tensors where ``like`` has tensors, else arrays of numpy. ``num_batches_tracked`` and what ``names`` maps to
        ``None`` are those of ``like``; but of weights that share memory in torch, all get the value of one.

    Raises:
        StateMismatch: parameters are missing, left over or of another shape, or weights that share memory in torch have
            two values in JAX; the message names all of them.
        ValueError: a path is in neither model.
        TypeError: an argument is of the wrong type.

    >>> params = {"fc": {"kernel": np.arange(6, dtype=np.float32).reshape(3, 2)}}
    >>> to_state_dict(params, like={"fc.weight": np.zeros((2, 3), np.float32)})
    {'fc.weight': array([[0., 2., 4.],
           [1., 3., 5.]], dtype=float32)}
    """
    asked = request(names, flattened, transpose_kernel)
    pairs = _pairs("to_state_dict", "like", like, params, model_state, asked)
    filled: dict[str, np.ndarray] = {}
    for entry, leaf, layout in pairs:
        if isinstance(leaf.value, jax.ShapeDtypeStruct):
            raise TypeError(f"to_state_dict: {leaf.label} must be an array, and is only a shape: {leaf.value}")
        if entry.key not in filled:
            filled[entry.key] = as_numpy(entry.value)
        filled[entry.key][entry.rows] = layout.to_torch(as_numpy(leaf.value))
    values = _shared(filled, like)
    return {key: as_like(values[key], value) if key in values else value for key, value in like.items()}


def _pairs(
    function: str, argument: str, state_dict: Mapping[str, Any], params: PyTree, model_state: PyTree, asked: Request
) -> list[Pair]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{function}: {argument} must be model.state_dict(), got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise TypeError(f"{function}: the keys of {argument} must be names, got {key!r}")
        if not is_array(value):
            hint = "; is the state_dict inside it?" if isinstance(value, Mapping) else "; leave it out"
            raise TypeError(f"{function}: {argument}[{key!r}] must be a tensor, got {type(value).__name__}{hint}")
    return pair(entries_of(state_dict), leaves_of(params, model_state), asked, function)


def _placed(value: np.ndarray, template: Any) -> Any:
    """Give a value the dtype and the kind of its template, and its place on the devices."""
    value = value.astype(template.dtype)
    if isinstance(template, jax.Array):
        return strong(value, template)
    if isinstance(template, jax.ShapeDtypeStruct):
        return jax.device_put(value, template.sharding)
    return value


def _shared(filled: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Give weights that share memory in torch one value; else loading would leave in it that of the last of them."""
    owners = {memory(like[key]): key for key in reversed(list(filled))}  # the first of each memory
    for key, value in filled.items():
        owner = owners[memory(like[key])] if memory(like[key]) else key
        if not np.array_equal(filled[owner], value, equal_nan=True):
            raise StateMismatch(f"to_state_dict: {owner} and {key} share their memory in torch, and differ in JAX")
    tied = {
        key: filled[owners[memory(value)]] for key, value in like.items() if memory(value) in owners.keys() - {None}
    }
    return {**filled, **tied}

"""Runs a NIR graph in NumPy, from the equations of the NIR paper; knows neither torch nor lmh nor nir.

Nodes are any objects with the attributes of the nir package's nodes; their kind is the name of their class. Time is a
forward Euler step of ``dt``; every potential and synaptic current starts at 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Array = np.ndarray


def run(nodes: dict[str, Any], edges: list[tuple[str, str]], frames: Array, dt: float) -> Array:
    """Run a graph with one Input and one Output.

    Args:
        nodes: by name.
        edges: from name to name, without cycles; what meets in a node is added up.
        frames: input at each step, [T, N, *F].
        dt: length of a step.

    Returns:
        The output at each step, [T, N, *G].
    """
    order = _order(nodes, edges)
    sources = {name: [a for a, b in edges if b == name] for name in nodes}
    state: dict[str, dict[str, Array]] = {name: {} for name in nodes}
    steps = []
    for frame in np.asarray(frames, dtype=np.float64):
        values: dict[str, Array] = {}
        for name in order:
            kind = type(nodes[name]).__name__
            if kind == "Input":
                values[name] = frame
                continue
            total = sum(values[source] for source in sources[name])
            values[name] = total if kind == "Output" else NODES[kind](nodes[name], total, state[name], dt)
            if kind == "Output":
                steps.append(total)
    return np.stack(steps)


def _order(nodes: dict[str, Any], edges: list[tuple[str, str]]) -> list[str]:
    """Sort nodes so that every node stands behind its sources."""
    waiting = {name: {a for a, b in edges if b == name} for name in nodes}
    order: list[str] = []
    while waiting:
        ready = [name for name, before in waiting.items() if before <= set(order)]
        if not ready:
            raise ValueError(f"a cycle through {sorted(waiting)}")
        order += ready
        for name in ready:
            del waiting[name]
    return order


def affine(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    """y = W x + b; leading axes of W are those of x."""
    y = np.einsum("...oi,n...i->n...o", np.asarray(node.weight, np.float64), x)
    return y + node.bias if hasattr(node, "bias") else y


def scale(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    return x * np.asarray(node.scale, np.float64)


def flatten(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    start, end = (int(axis) % (x.ndim - 1) for axis in (node.start_dim, node.end_dim))
    return x.reshape(*x.shape[: start + 1], -1, *x.shape[end + 2 :])


def threshold(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    return (x > node.threshold).astype(np.float64)


def _pair(value: Any, axes: int) -> list[int]:
    return [int(item) for item in np.broadcast_to(np.asarray(value), (axes,))]


def _windows(x: Array, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Array:
    """[N, C, *F] → [N, C, *out, *kernel]."""
    axes = len(kernel)
    x = np.pad(x, [(0, 0), (0, 0), *((pad, pad) for pad in padding)])
    spans = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    view = sliding_window_view(x, spans, axis=tuple(range(2, 2 + axes)))
    moves = tuple(slice(None, None, step) for step in stride)
    taps = tuple(slice(None, None, step) for step in dilation)
    return view[(slice(None), slice(None), *moves, *taps)]


def convolution(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    """Cross-correlation over one or two axes."""
    weight = np.asarray(node.weight, np.float64)
    axes = weight.ndim - 2
    stride, padding, dilation = (_pair(value, axes) for value in (node.stride, node.padding, node.dilation))
    view = _windows(x, list(weight.shape[2:]), stride, padding, dilation)
    groups, batch, out = int(node.groups), x.shape[0], view.shape[2 : 2 + axes]
    columns = np.moveaxis(view, 1, 1 + axes).reshape(batch, int(np.prod(out)), groups, -1)
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1)
    y = np.stack([columns[:, :, g] @ kernels[g].T for g in range(groups)], axis=2)
    y = np.moveaxis(y.reshape(batch, *out, -1), -1, 1)
    return y + np.asarray(node.bias).reshape(-1, *[1] * axes)


def _pool(node: Any, x: Array) -> Array:
    kernel, stride, padding = (_pair(value, 2) for value in (node.kernel_size, node.stride, node.padding))
    return _windows(x, kernel, stride, padding, [1, 1])


def sum_pool(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    return _pool(node, x).sum((-1, -2))


def average_pool(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    """The mean of the window, the zeros of the padding counted."""
    return _pool(node, x).mean((-1, -2))


def _fire(node: Any, v: Array, state: dict[str, Array]) -> Array:
    """z = 1 where v > v_threshold, and v = v_reset there."""
    spikes = v > node.v_threshold
    state["v"] = np.where(spikes, node.v_reset, v)
    return spikes.astype(np.float64)


def _old(state: dict[str, Array], name: str, like: Array) -> Array:
    return state.get(name, np.zeros_like(like))


def integrate_and_fire(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    """v' = r I."""
    return _fire(node, _old(state, "v", x) + dt * (node.r * x), state)


def leaky(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    """τ v' = (v_leak − v) + r I."""
    v = _old(state, "v", x)
    return _fire(node, v + dt / np.asarray(node.tau, np.float64) * (node.v_leak - v + node.r * x), state)


def current_based_leaky(node: Any, x: Array, state: dict[str, Array], dt: float) -> Array:
    """τ_syn i' = −i + w_in S,  τ_mem v' = (v_leak − v) + r i."""
    current, v = _old(state, "i", x), _old(state, "v", x)
    current = current + dt / np.asarray(node.tau_syn, np.float64) * (node.w_in * x - current)
    state["i"] = current
    return _fire(node, v + dt / np.asarray(node.tau_mem, np.float64) * (node.v_leak - v + node.r * current), state)


NODES = {
    "Affine": affine,
    "Linear": affine,
    "Scale": scale,
    "Flatten": flatten,
    "Threshold": threshold,
    "Conv1d": convolution,
    "Conv2d": convolution,
    "SumPool2d": sum_pool,
    "AvgPool2d": average_pool,
    "IF": integrate_and_fire,
    "LIF": leaky,
    "CubaLIF": current_based_leaky,
}

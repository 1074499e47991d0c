"""correct: from a converted network to the calibration of a better one; and what of a network a calibration holds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..arguments import check_kind
from ..errors import ArgumentError
from ..records import Calibration, Prepared, short_text
from ..spiking import sites
from ..time_axis import time_axis
from .corrections import Correction
from .layers import layers
from .lockstep import Lockstep, input_batches


def correct(
    snn: fx.GraphModule,
    prepared: Prepared,
    data: Iterable[Any] | Tensor,
    corrections: Correction | Sequence[Correction],
    *,
    calibration: Calibration | None = None,
) -> Calibration:
    """Correct a spiking network layer by layer, so that it agrees with its ANN at few steps; no labels, no gradients.

    Both networks run side by side over the data, node by node from input to output. Just before a layer or a site
    runs, each correction changes it, in the order given; later layers see the corrected earlier ones. The same data
    and corrections give the same result.

    Args:
        snn: from :func:`lmh.convert.convert`; not changed. T, the neurons and what is corrected already are its own.
        prepared: the ANN that it was made from, :attr:`lmh.convert.Conversion.prepared`.
        data: batches [N, *F] (or tuples that begin with one), or one tensor; [T, N, *F] for event frames. Labels are
            not read. What live nodes give for all samples and steps is held in memory: for 32×32 images 1,024 samples
            are well, for 224×224 some 128.
        corrections: for example ``[WeightRegression(), SpikingMinError()]``.
        calibration: what the network started from, so that the result names its policy too.

    Returns:
        θ, v_init and every other tensor in which the network differs from a fresh conversion. Pass it to ``convert``
        or ``assemble`` as the calibration, with the same T and neurons, to build the corrected network.

    Raises:
        ArgumentError: if the spiking network was not made from ``prepared``, or no correction is given.
        CalibrationError: if the data has no sample, or values that are not finite.

    >>> from torch import nn
    >>> from lmh.convert import convert
    >>> from lmh.calibrate import BiasCorrection
    >>> ann, images = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(64, 4)
    >>> first = convert(ann, timesteps=2, data=images)
    >>> calibration = correct(first.snn, first.prepared, images, BiasCorrection(), calibration=first.calibration)
    >>> sorted(calibration.tensors)
    ['2.bias']
    >>> corrected = convert(ann, timesteps=2, data=images, calibration=calibration).snn
    >>> torch.allclose(corrected(images).mean(0), ann(images).mean(0), atol=1e-5)
    True
    """
    wanted = [corrections] if isinstance(corrections, (Correction, str)) else list(corrections)
    strange = [kind for kind in wanted if not isinstance(kind, Correction)]
    if strange or not wanted:
        raise ArgumentError(
            f"correct: {', '.join(map(str, strange)) or 'no correction'} came; expected corrections. "
            "Pass [WeightRegression(), SpikingMinError()], from lmh.calibrate."
        )
    check_kind("correct: snn", snn, fx.GraphModule, "conversion.snn")
    check_kind("correct: prepared", prepared, Prepared, "conversion.prepared")
    snn = own_copy(snn)
    batches = input_batches(snn, data, "correct: data")
    lockstep = Lockstep(prepared, snn, batches)
    found = layers(lockstep)
    to_fit = {layer.synapse: layer for layer in found if layer.synapse is not None}
    to_align = {layer.home: layer for layer in found}
    neurons = sites(snn)
    with torch.no_grad():
        for node in lockstep.nodes():
            for correction in wanted:
                if node in to_fit:
                    correction.fit(lockstep, to_fit[node])
                if node in to_align:
                    correction.align(lockstep, to_align[node])
                if node.target in neurons:
                    correction.charge(lockstep, node)
    before = "thresholds of the network" if calibration is None else calibration.policy
    return changes(snn, prepared, " + ".join([before, *map(short_text, wanted)]), sum(lockstep.sizes))


def own_copy(snn: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in eval mode, without any state that the caller carries."""
    snn = copy.deepcopy(snn)
    time_axis(snn).carry = False
    for site in sites(snn).values():
        site.drop_state()
    return snn.eval()


def changes(snn: fx.GraphModule, prepared: Prepared, policy: str, samples: int) -> Calibration:
    """Return the calibration that turns a fresh conversion of ``prepared`` into ``snn``, whatever made the difference.

    Args:
        snn: of any training or correction.
        prepared: the ANN.
        policy: what found the values, as text.
        samples: how many samples were seen.

    >>> from torch import nn
    >>> from lmh.convert import convert
    >>> conversion = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2, data=torch.rand(64, 4))
    >>> _ = conversion.snn.get_parameter("2.bias").data.add_(1)
    >>> list(changes(conversion.snn, conversion.prepared, "by hand", 0).tensors)
    ['2.bias']
    """
    original, found = prepared.model.state_dict(), sites(snn)
    tensors = {}
    for name, value in snn.state_dict().items():
        path, _, field = name.rpartition(".")
        if path in found:
            changed = field not in ("base_threshold", "v_init") and bool(value.any())
        else:
            changed = name not in original or not torch.equal(original[name], value)
        if changed:
            tensors[name] = value.detach().clone()
    return Calibration(
        policy,
        time_axis(snn).timesteps,
        samples,
        {path: site.base_threshold.clone() for path, site in found.items()},
        {path: site.v_init.detach().clone() for path, site in found.items()},
        tensors,
    )


def replay(snn: fx.GraphModule, calibration: Calibration) -> None:
    """Put the tensors of a calibration into a fresh conversion; θ and v_init are there already.

    Args:
        snn: its tensors change.
        calibration: of the same ANN and neurons.

    Raises:
        ArgumentError: if a tensor belongs to another network or to other neurons.

    >>> from torch import nn
    >>> from lmh.convert import convert
    >>> snn = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 2, data=torch.rand(64, 4)).snn
    >>> replay(snn, Calibration("by hand", 2, 0, {}, {}, {"2.bias": torch.tensor([1.0, 2.0])}))
    >>> snn.get_parameter("2.bias").tolist()
    [1.0, 2.0]
    """
    own = snn.state_dict()
    for name, value in calibration.tensors.items():
        if name not in own or own[name].shape != value.shape:
            there = f"{list(own[name].shape)}" if name in own else "nothing of that name"
            raise ArgumentError(
                f"calibration: {name} {list(value.shape)} came and the network has {there}; expected a calibration of "
                "this ANN and of neurons of this granularity. Convert with the neuron= and T that it was made with."
            )
        own[name].copy_(value)

"""SpikingSite: the LM-H neurons that stand where one activation of the ANN stood."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from .arguments import check_kind, refuse
from .batch_norm import PendingCurrent
from .errors import ArgumentError, StateError
from .fused import run_neurons
from .kernels import Kernel, choose
from .neurons import Coefficients, State
from .passes import Job
from .qcfs import positive
from .resets import AttachedReset, DetachedReset, Reset
from .surrogates import Surrogate, Triangle
from .time_axis import TimeAxis, Timed


@dataclass(frozen=True)
class IF:
    """λ_S = λ_D = 1, μ_S = μ_D = 0: the start of hybrid training, equal to QCFS with L = T."""

    lambda_s: float = 1.0
    lambda_d: float = 1.0
    mu_s: float = 0.0
    mu_d: float = 0.0


@dataclass(frozen=True)
class LIF:
    """λ_S = leak, λ_D = 1, μ = 0: the start of progressive STBP."""

    lambda_s: float = 0.5
    lambda_d: float = 1.0
    mu_s: float = 0.0
    mu_d: float = 0.0


@dataclass(frozen=True)
class PerLayer:
    """One value for the whole site, shape []."""


@dataclass(frozen=True)
class PerChannel:
    """One value for each channel (axis 1 of the activation), shape [C]."""


@dataclass(frozen=True)
class PerStep:
    """One value for each step, indexed by absolute t, shape [T]."""


@dataclass(frozen=True)
class Ranges:
    """Open intervals (low, high) that the learnable coefficients stay in. Without units."""

    lambda_s: tuple[float, float] = (0.0, 1.5)
    lambda_d: tuple[float, float] = (0.5, 1.5)
    mu_s: tuple[float, float] = (-0.5, 0.5)
    mu_d: tuple[float, float] = (-0.5, 0.5)


@dataclass(frozen=True)
class LMH:
    """What kind of neuron a conversion puts in.

    Attributes:
        preset: the coefficients at the start, ``IF()`` or ``LIF(leak)``.
        granularity: of the raw values of λ, μ (and of θ, where it is the finer of the two).
        ranges: what λ and μ can reach.
        surrogate: ds/du of the backward pass.
        reset: whether a gradient passes the reset; unless given ``AttachedReset()`` from an IF start, which conserves
            charge, and the paper's ``DetachedReset()`` from a LIF start. A surrogate that exceeds 1, such as
            ``Triangle(0.25)``, wants ``DetachedReset()``: through the reset its gradients grow with T.
    """

    preset: IF | LIF = field(default_factory=IF)
    granularity: PerLayer | PerChannel | PerStep = field(default_factory=PerLayer)
    ranges: Ranges = field(default_factory=Ranges)
    surrogate: Surrogate = field(default_factory=Triangle)
    reset: Reset | None = None

    def __post_init__(self) -> None:
        check_kind("LMH: preset", self.preset, (IF, LIF), "IF()", "LIF(0.5)")
        granularities = (PerLayer, PerChannel, PerStep)
        check_kind("LMH: granularity", self.granularity, granularities, "PerLayer()", "PerChannel()", "PerStep()")
        check_kind("LMH: ranges", self.ranges, Ranges, "Ranges()")
        for name in ("surrogate", "reset"):
            if isinstance(kind := getattr(self, name), type):
                raise refuse(f"LMH: {name}", kind, "a value, not its class", f"Pass {kind.__name__}().")
        for name in COEFFICIENTS:
            preset, (low, high) = getattr(self.preset, name), getattr(self.ranges, name)
            if not low < preset < high:
                raise ArgumentError(
                    f"LMH: the preset's {name} is {preset}; expected it inside ({low}, {high}). "
                    "Widen it with ranges=Ranges(...)."
                )

    @property
    def backward_reset(self) -> Reset:
        """Return the reset of the backward pass: the given one, or what suits the preset."""
        return self.reset or (AttachedReset() if isinstance(self.preset, IF) else DetachedReset())


COEFFICIENTS = ("lambda_s", "lambda_d", "mu_s", "mu_d")


def bounded(raw: Tensor, limits: Tensor) -> Tensor:
    """Map raw values onto (low, high): 0 gives the preset exactly, with slope 1 there (ours).

    Args:
        raw: [K, …].
        limits: [K, 3]: the preset, preset − low and high − preset of each of the K.

    >>> bounded(torch.zeros(2), torch.tensor([(0.5, 0.5, 1.0), (1.0, 0.5, 0.5)]))
    tensor([0.5000, 1.0000])
    """
    preset, down, up = limits.to(raw.dtype).reshape(len(limits), 3, *[1] * (raw.ndim - 1)).unbind(1)
    reach = torch.where(raw < 0, down, up)
    return preset + reach * torch.tanh(raw / reach)


def _limits(neuron: LMH) -> Tensor:
    """The presets of λ_S, λ_D, μ_S and μ_D, and how far these reach below and above, [4, 3]."""
    presets = [(getattr(neuron.preset, name), *getattr(neuron.ranges, name)) for name in COEFFICIENTS]
    return torch.tensor([(preset, preset - low, high - preset) for preset, low, high in presets])


def state_dtype(current: Tensor) -> torch.dtype:
    """Return the dtype of the potentials for a current: its own, float32 where that has 16 bits.

    >>> state_dtype(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.float32 if current.dtype in (torch.float16, torch.bfloat16) else current.dtype


class SpikingSite(Timed):
    """LM-H neurons in the place of one activation.

    Args:
        time: the network's time axis.
        v_threshold: θ₀, shape [] or [C], in the unit of the current.
        v_init: v_S[0] as a fraction of θ, shape [] or [C].
        neuron: preset, granularity, ranges, surrogate, reset.
        channels: C, needed by ``PerChannel()``.
        static: the current does not depend on time: it comes as [N, *F] and is taken T times.

    Parameters (a raw value of 0 is the start): ``raw_threshold`` with θ = θ₀ exp(raw), ``raw_lambda_s``,
    ``raw_lambda_d``, ``raw_mu_s``, ``raw_mu_d`` through :func:`bounded`, and ``v_init``.

    Raises:
        ArgumentError: if a threshold is not finite and positive, or C does not fit.
    """

    def __init__(
        self,
        time: TimeAxis,
        v_threshold: Tensor,
        v_init: Tensor,
        neuron: LMH,
        *,
        channels: int | None = None,
        static: bool = False,
    ) -> None:
        super().__init__(time)
        self.neuron = neuron
        self.static = static
        for name, value in {"v_threshold": v_threshold, "v_init": v_init}.items():
            if value.ndim > 1 or (value.ndim == 1 and channels is not None and len(value) != channels):
                raise ArgumentError(f"{name} has shape {list(value.shape)}; expected [] or [{channels}].")
        base, start = (value.clone() for value in torch.broadcast_tensors(v_threshold.detach(), v_init.detach()))
        if not (torch.isfinite(base).all() and (base > 0).all() and torch.isfinite(start).all()):
            raise ArgumentError(
                f"v_threshold is {base.tolist()} and v_init {start.tolist()}; expected finite numbers, θ above 0."
            )
        shape = self._granular_shape(channels)
        self.base_threshold: Tensor
        self.register_buffer("base_threshold", base.float())
        self.raw_threshold = nn.Parameter(torch.zeros(self._threshold_shape(shape, base)))
        self.v_init = nn.Parameter(start.float())
        for name in COEFFICIENTS:
            self.register_parameter(f"raw_{name}", nn.Parameter(torch.zeros(shape)))
        self.limits: Tensor
        self.register_buffer("limits", _limits(neuron), persistent=False)
        self.kernel: Kernel | None = None
        self._carried: tuple[State, int] | None = None

    def _granular_shape(self, channels: int | None) -> tuple[int, ...]:
        match self.neuron.granularity:
            case PerLayer():
                return ()
            case PerChannel():
                if channels is None:
                    raise ArgumentError("PerChannel() needs channels=; this site has none.")
                return (channels,)
            case PerStep():
                return (self.time.timesteps,)

    def _threshold_shape(self, shape: tuple[int, ...], base: Tensor) -> tuple[int, ...]:
        if isinstance(self.neuron.granularity, PerStep):
            return (*shape, *base.shape)
        return tuple(torch.broadcast_shapes(shape, base.shape))

    @property
    def v_threshold(self) -> Tensor:
        """θ, shape [] or [C] (with a first axis of T for ``PerStep()``), in the unit of the current."""
        return positive(self.base_threshold, self.raw_threshold)

    def coefficients(self) -> tuple[Tensor, ...]:
        """Return λ_S, λ_D, μ_S and μ_D, each of shape [], [C] or [T]."""
        raw = torch.stack([getattr(self, f"raw_{name}") for name in COEFFICIENTS])
        return bounded(raw, self.limits).unbind()

    def forward(self, current: Tensor | PendingCurrent) -> Tensor:
        """Run the neurons over the steps of this call.

        Args:
            current: [T·N, *F], or [N, *F] where the site is static; in the unit of θ. Inside
                :func:`lmh.fused_layers` it may come uncomputed.

        Returns:
            θ s, [T·N, *F], of the current's dtype. The state is float32 for 16-bit currents.

        Raises:
            StateError: if the carried state is of another shape, or per-step parameters end before t.
        """
        steps = self.time.steps
        like = current.x if isinstance(current, PendingCurrent) else current
        dtype = state_dtype(like)
        state, begun = self._start(like, dtype)
        values = self._values(dtype, begun, steps)
        tensors = (current, *state, *values)
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        kernel = choose(like, steps=steps, training=training)
        per_step = isinstance(self.neuron.granularity, PerStep)
        job = Job(steps, self.neuron.surrogate, self.neuron.backward_reset, self.static, per_step)
        ran = run_neurons(job, current, state, values, kernel=kernel, keep=self.time.carry)
        if not torch.compiler.is_compiling():
            self.kernel = ran.kernel
        if ran.state is not None:
            self._carried = State(*(potential.detach() for potential in ran.state)), begun + steps
        return ran.output

    def _values(self, dtype: torch.dtype, begun: int, steps: int) -> Coefficients:
        """θ, λ and μ, each [] or [C], behind an axis of the ``steps`` steps after ``begun`` if per step."""
        values = Coefficients(self.v_threshold, *self.coefficients())
        if not isinstance(self.neuron.granularity, PerStep):
            return Coefficients(*(value.to(dtype) for value in values))
        if begun + steps > self.time.timesteps:
            raise StateError(
                f"steps {begun + 1} to {begun + steps} were asked for; the per-step parameters end at "
                f"{self.time.timesteps}. Run at most {self.time.timesteps} steps, or convert with more."
            )
        return Coefficients(*(value[begun : begun + steps].to(dtype) for value in values))

    def _start(self, current: Tensor, dtype: torch.dtype) -> tuple[State, int]:
        """Return the state before the first step of this call and the number of steps already run."""
        theta = self.v_threshold[0] if isinstance(self.neuron.granularity, PerStep) else self.v_threshold
        start = State(torch.zeros((), dtype=dtype, device=theta.device), (self.v_init * theta).to(dtype))
        if self._carried is None:
            return start, 0
        state, begun = self._carried
        batch = len(current) if self.static else len(current) // self.time.steps
        if state.v_soma.shape != (batch, *current.shape[1:]):
            raise StateError(
                f"the carried state has shape {list(state.v_soma.shape)} and the current "
                f"{[batch, *current.shape[1:]]}; expected the same. Open a new carry_state block for each batch."
            )
        return state, begun

    def drop_state(self) -> None:
        """Forget the carried state."""
        self._carried = None

    def keep_samples(self, which: Tensor) -> None:
        """Keep the carried state of the samples where ``which``, [N], is True."""
        if self._carried is not None:
            state, begun = self._carried
            self._carried = State(*(each if each.ndim == 0 else each[which] for each in state)), begun

    def extra_repr(self) -> str:
        """Return θ's mean, the preset and T, for the module's repr."""
        theta = float(self.v_threshold.detach().mean()) if self.base_threshold.device.type != "meta" else float("nan")
        return f"v_threshold={theta:.4g}, {self.neuron.preset}, timesteps={self.time.timesteps}"


def sites(snn: nn.Module) -> dict[str, SpikingSite]:
    """Return the spiking sites of a network by path, in the order in which they run.

    A path is the one of the activation that the site replaced; a module called at several places has
    one site for each, ``layer1.0.relu`` and ``layer1.0.relu_1``.

    >>> from lmh.convert import load
    >>> list(sites(load("zoo:digits-cnn-t4")))
    ['stem.2', 'block.relu1', 'block.relu2', 'down.2']
    """
    found = {name: module for name, module in snn.named_modules() if isinstance(module, SpikingSite)}
    ordered = (
        [node.target for node in snn.graph.nodes if node.target in found] if isinstance(snn, fx.GraphModule) else []
    )
    return {name: found[name] for name in ordered} or found


def kernels_used(snn: nn.Module) -> dict[str, Kernel | None]:
    """Return what ran the neurons of each site, by path, in its last call; None for a site that was never called.

    >>> from .time_axis import TimeAxis
    >>> site = SpikingSite(TimeAxis(4), torch.tensor(1.0), torch.tensor(0.5), LMH())
    >>> _ = site(torch.ones(8, 3, requires_grad=True))
    >>> kernels_used(site)
    {'': <Kernel.FUSED: 'fused'>}
    """
    return {path: site.kernel for path, site in sites(snn).items()}

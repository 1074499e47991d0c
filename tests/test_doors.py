"""Natural mistakes at the doors of the library: each gets an error that says what to pass, and passing that works."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import nets
from lmh import IF, LMH, PerChannel, carry_state, evaluate, per_step, prefixes, zoo
from lmh.calibrate import Max, MinError, calibrate
from lmh.convert import Conversion, EventFrames, ReluSurgery, convert, load_source, prepare
from lmh.errors import ArgumentError, LMHError
from lmh.finetune import CrossEntropy, Schedule, finetune, fit

X, Y = torch.rand(8, 4), torch.arange(8) % 3
PAIR = r"DataLoader\(TensorDataset\(x, y\), batch_size=128\)"


@pytest.fixture(scope="module")
def conversion() -> Conversion:
    return convert(nets.two_layers(), 2, data=X)


def converts(data: Any) -> None:
    convert(nets.two_layers(), 2, data=data)


def converts_with_an_example(data: Any) -> None:
    convert(nets.two_layers(), 2, data=data, example_input=X)


def calibrates(data: Any) -> None:
    calibrate(prepare(nets.two_layers(), (4,)), Max(), 2, data)


def evaluates(data: Any) -> None:
    evaluate(convert(nets.two_layers(), 2, data=X).snn, data)


def trains(data: Any) -> None:
    finetune(convert(nets.two_layers(), 2, data=X).snn, data, epochs=1)


def validates(data: Any) -> None:
    finetune(convert(nets.two_layers(), 2, data=X).snn, [(X, Y)], data, epochs=1)


DOORS = [converts, converts_with_an_example, calibrates, evaluates, trains, validates]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digits", r"the string 'digits'; expected batches.*lmh\.zoo\.load_data\(\"digits\"\).*lmh\.zoo\.Batches"),
        (Path("digits"), r"expected batches.*lmh\.zoo\.load_data"),
        ((X, Y), rf"a tuple of Tensor, Tensor; expected batches.*pass {PAIR}, or \[\(x, y\)\]"),
        ((X.numpy(), Y.numpy()), rf"a tuple of ndarray, ndarray; expected batches.*pass {PAIR}"),
        (X.numpy(), r"a numpy array \[8, 4\] of float32; expected batches.*torch\.from_numpy"),
        ({"image": X, "label": Y}, rf"a dict with the keys image, label; expected batches.*{PAIR}"),
        (TensorDataset(X, Y), r"TensorDataset; expected batches.*DataLoader\(dataset, batch_size=128\)"),
        (DataLoader, r"the class DataLoader; expected batches.*DataLoader\(…\)"),
        (nn.Sequential(nn.Linear(4, 4)), r"a Sequential; expected batches.*order of the arguments"),
        (7, rf"is 7; expected batches.*{PAIR}"),
        (zoo.load_data("digits"), r"a DataSet; expected batches.*lmh\.zoo\.Batches\(data\.train, preprocessing\)"),
        (zoo.load_data("digits").test, r"an ArraySplit; expected batches.*lmh\.zoo\.Batches\(split, preprocessing\)"),
        ([{"image": X, "label": Y}], r"keys image, label; expected a tensor.*\[\(b\['image'\], b\['label'\]\) for b"),
        ([X.numpy()], r"a batch is a numpy array \[8, 4\] of float32; expected a tensor.*torch\.from_numpy"),
        ([(X.numpy(), Y)], r"the first entry of a batch is a numpy array.*torch\.from_numpy"),
        ([([*X], Y)], r"the first entry of a batch is a list of Tensor.*torch\.stack"),
        ([()], r"a batch is a tuple of nothing; expected a tensor"),
        (["digits"], r"a batch is the string 'digits'; expected a tensor"),
        ([(X * 255).byte()], r"a uint8 tensor \[8, 4\]; expected floating.*\(x\.float\(\) / 255 - mean\) / std"),
        ([X[0]], r"a float32 tensor \[4\]; expected \[N, \*F\].*x\[None\]"),
        ([X[:0]], r"a float32 tensor \[0, 4\]; expected \[N, \*F\] with N ≥ 1"),
    ],
    ids=["string", "path", "pair", "numpy-pair", "numpy", "dict", "dataset", "class", "network", "number",
         "zoo-data", "zoo-split", "dict-batch", "numpy-batch", "numpy-in-batch", "list-in-batch", "empty-batch",
         "string-batch", "uint8", "sample", "no-sample"],
)  # fmt: skip
def test_data_of_another_form_is_refused_with_what_to_pass(
    door: Callable[[Any], None], data: Any, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        door(data)


def test_a_list_of_x_and_y_is_no_list_of_batches() -> None:
    for door in (converts, calibrates, evaluates):
        with pytest.raises(ArgumentError, match=r"an int64 tensor \[8\]; expected floating.*pass tuples \(x, y\)"):
            door([X, Y])
    for door in (trains, validates):
        with pytest.raises(LMHError, match="have no labels"):
            door([X, Y])


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_what_the_errors_advise_is_accepted(door: Callable[[Any], None]) -> None:
    door(DataLoader(TensorDataset(X, Y), batch_size=4))
    door([(X, Y)])
    door([(X, Y.int())])
    door([(torch.from_numpy(X.double().numpy()), Y)])


class Stream(IterableDataset):
    def __iter__(self) -> Iterable[tuple[Tensor, Tensor]]:  # type: ignore[override]
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_loader_over_a_stream_is_accepted(door: Callable[[Any], None]) -> None:
    door(DataLoader(Stream(), batch_size=4))


def test_one_tensor_is_split_into_batches(conversion: Conversion) -> None:
    calibrates(X)
    assert evaluate(conversion.snn, X).samples == 8
    assert evaluate(conversion.snn, [(X,)]).samples == 8
    for train in (trains, validates):
        with pytest.raises(ArgumentError, match=r"float32 tensor \[8, 4\]; expected batches.*DataLoader"):
            train(X)
    with pytest.raises(ArgumentError, match=r"uint8 tensor \[8, 4\]; expected floating.*/ 255"):
        converts((X * 255).byte())


def test_one_tensor_of_frames_is_split_over_samples() -> None:
    frames = torch.rand(200, 130, 4)
    snn = convert(nets.two_layers(), 200, data=frames, encoding=EventFrames(), calibration=Max()).snn
    assert evaluate(snn, frames).samples == 130


@pytest.mark.parametrize("door", [trains, validates], ids=lambda door: door.__name__)
def test_a_generator_cannot_be_trained_on(door: Callable[[Any], None]) -> None:
    with pytest.raises(ArgumentError, match=r"a generator; expected batches that can be read once for each.*list"):
        door((X, Y) for _ in range(2))


@pytest.mark.parametrize("door", [evaluates, trains, validates], ids=lambda door: door.__name__)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Y.tolist(), r"labels y is a list of int, int.*expected whole numbers from 0.*torch\.tensor\(y\)"),
        (Y.numpy(), r"labels y is a numpy array \[8\] of int64; expected whole numbers"),
        (torch.eye(3)[Y], r"labels y is a float32 tensor \[8, 3\]; expected whole numbers.*y\.argmax\(1\)"),
        (Y[:, None], r"labels y is an int64 tensor \[8, 1\].*tensor \[8\].*y\.flatten\(\)"),
        (Y[:5], r"labels y is an int64 tensor \[5\]; expected whole numbers from 0 in a tensor \[8\]"),
        (Y - 1, r"a label is -1; expected whole numbers from 0.*Drop unlabelled"),
    ],
    ids=["list", "numpy", "one-hot", "column", "short", "negative"],
)
def test_labels_of_another_form_are_refused(door: Callable[[Any], None], labels: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        door([(X, labels)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "minerror"}, r"the string 'minerror'; expected a policy.*Pass MinError\(\)"),
        ({"calibration": "percentile:99"}, r"Pass Percentile\(\)"),
        ({"calibration": "batchnorm"}, r"Pass BatchNormStatistics\(\)"),
        ({"calibration": "median"}, r"Pass one of Max\(\), Percentile\(\), MinError\(\), BatchNormStatistics\(\)"),
        ({"calibration": MinError}, r"the class MinError; expected a policy.*Pass MinError\(\)"),
        ({"neuron": IF()}, r"neuron is an IF; expected a value of type LMH.*LMH\(IF\(\)\)"),
        ({"neuron": LMH}, r"neuron is the class LMH"),
        ({"encoding": EventFrames}, r"encoding is the class EventFrames; expected.*EventFrames\(\)"),
        ({"encoding": "direct"}, r"encoding is the string 'direct'.*Pass DirectCoding\(\) or EventFrames\(\)"),
        ({"surgery": True}, r"surgery is True; expected a value of type ReluSurgery\. Pass ReluSurgery\(\)"),
        ({"surgery": ReluSurgery}, r"surgery is the class ReluSurgery"),
        ({"rules": [nn.GELU]}, r"rules is a list of type; expected.*rules=\{nn\.GELU: as_neuron\}"),
        ({"keep": "relu"}, r"keep is the string 'relu'; expected a list of paths\. Pass \['relu'\]"),
        ({"keep": [nn.ReLU()]}, r"keep: an entry is a ReLU; expected a path as text"),
        ({"keep": 3}, r"keep is 3; expected a list of paths"),
        (
            {"example_input": (1, 4)},
            r"example input is a tuple of int, int; expected a tensor \[N.*torch\.zeros",
        ),
        ({"example_input": X.numpy()}, r"example input is a numpy array \[8, 4\]"),
        ({"example_input": X[0]}, r"example input is a float32 tensor \[4\]; expected a tensor \[N, \*F\]"),
        ({"example_input": X, "encoding": EventFrames()}, r"expected a tensor \[T, N, \*F\].*T steps in front"),
    ],
)
def test_options_of_convert_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        convert(nets.two_layers(), 2, **{"data": X, **options})


@pytest.mark.parametrize("timesteps", [True, 4.0, "4", None, 0])
def test_timesteps_that_are_no_whole_number_are_refused(timesteps: Any) -> None:
    for door in (
        lambda: convert(nets.two_layers(), timesteps, data=X),
        lambda: calibrate(prepare(nets.two_layers(), (4,)), Max(), timesteps, X),
    ):
        with pytest.raises(ArgumentError, match=r"timesteps is .*expected a whole number from 1 to 1024"):
            door()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.ReLU, r"the class ReLU; expected a torch\.nn\.Module\. Build it first: ReLU\(…\)"),
        (nets.two_layers().state_dict(), r"OrderedDict with the keys 0\.weight.*Load the state_dict into the network"),
        ("zoo:digits-cnn", r"the string 'zoo:digits-cnn'.*lmh\.convert\.load_source\('zoo:digits-cnn'\)\.model"),
        (load_source("zoo:digits-cnn"), r"a Source; expected a torch\.nn\.Module\. Pass its \.model"),
        (None, r"is None; expected a torch\.nn\.Module\. Pass the network itself"),
    ],
    ids=["class", "state-dict", "name", "source", "none"],
)
def test_what_is_no_network_is_refused_at_every_door(conversion: Conversion, network: Any, message: str) -> None:
    for door in (
        lambda: convert(network, 2, data=X),
        lambda: evaluate(network, [X]),
        lambda: finetune(network, [(X, Y)]),
        lambda: fit(network, [(X, Y)], None, Schedule(epochs=1)),
    ):
        with pytest.raises(ArgumentError, match=message):
            door()
    if network is not None:
        with pytest.raises(ArgumentError, match=message):
            evaluate(conversion.snn, [X], ann=network)
        with pytest.raises(ArgumentError, match=message):
            finetune(conversion.snn, [(X, Y)], teacher=network)


def test_a_conversion_in_the_place_of_its_network_is_named(conversion: Conversion) -> None:
    for door in (lambda: evaluate(conversion, [X]), lambda: finetune(conversion, [(X, Y)])):  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"a Conversion; expected a torch\.nn\.Module\. Pass its \.snn"):
            door()


def test_a_spiking_network_is_not_converted_again(conversion: Conversion) -> None:
    for network in (conversion, conversion.snn):
        with pytest.raises(
            ArgumentError, match=r"a spiking network already \(.*\); expected the ANN\. Pass the ANN again"
        ):
            convert(network, 2, data=X)  # type: ignore[arg-type]


def test_calibrate_wants_a_prepared_network_and_a_policy() -> None:
    with pytest.raises(ArgumentError, match=r"a Sequential; expected a value of type Prepared.*lmh\.convert\.prepare"):
        calibrate(nets.two_layers(), Max(), 2, X)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"the string 'max'; expected a policy\. Pass Max\(\), from lmh\.calibrate"):
        calibrate(prepare(nets.two_layers(), (4,)), "max", 2, X)  # type: ignore[arg-type]


def test_a_policy_of_the_users_own_works() -> None:
    class Half:
        needs_data: ClassVar[bool] = True
        granularity = PerChannel()

        def threshold(self, histogram: Any, timesteps: int) -> Tensor:
            return histogram.maximum / 2

    @dataclass(frozen=True)
    class Named(Half):
        why: str = "shown"
        granularity: PerChannel = field(default_factory=PerChannel)

    whole = convert(nets.two_layers(), 2, data=X, calibration=Max())
    for policy, text in ((Half(), "Half(per channel)"), (Named(), "Named(why='shown', per channel)")):
        half = convert(whole.prepared.model, 2, data=X, calibration=policy).calibration
        assert torch.equal(half.v_threshold["1"], whole.calibration.v_threshold["1"] / 2)
        assert half.policy == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": 10}, r"schedule is 10; expected a value of type Schedule\. Pass Schedule\(epochs=10\)"),
        ({"schedule": {"epochs": 1}}, r"schedule is a dict with the keys epochs"),
        ({"epochs": 2.0}, r"epochs is 2\.0; expected a whole number"),
        ({"epochs": True}, r"epochs is True; expected a whole number"),
        ({"checkpoint": 3, "epochs": 1}, r"checkpoint is 3; expected a value of type str or Path"),
    ],
)
def test_options_of_finetune_of_another_type_are_refused(
    conversion: Conversion, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        finetune(conversion.snn, [(X, Y)], **options)


@pytest.mark.parametrize("loss", ["tet", CrossEntropy, nn.CrossEntropyLoss()])
def test_a_loss_that_is_none_of_ours_says_what_it_lacks(loss: Any) -> None:
    with pytest.raises(ArgumentError, match=r"expected a loss that says per_step\. Pass CrossEntropy\(\) or TET\(\)"):
        Schedule(epochs=1, loss=loss)


def test_stand_ins_that_are_no_types_are_refused() -> None:
    for stand_ins in (nn.SiLU, [nn.SiLU], ("SiLU",), (nn.SiLU(),)):
        with pytest.raises(ArgumentError, match=r"expected a tuple of module types.*ReluSurgery\(\(nn\.SiLU, nn\.GELU"):
            ReluSurgery(stand_ins)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [per_step, prefixes, lambda snn, x: carry_state(snn).__enter__()])
def test_the_record_of_a_conversion_is_no_network(call: Callable[..., object], conversion: Conversion) -> None:
    with pytest.raises(ArgumentError, match=r"is a Conversion; expected the module .* Pass its \.snn\."):
        call(conversion, torch.rand(2, 4))


def test_one_path_to_keep_in_prepare_is_no_list() -> None:
    with pytest.raises(ArgumentError, match=r"Pass \['relu'\]"):
        prepare(nets.two_layers(), (4,), keep="relu")

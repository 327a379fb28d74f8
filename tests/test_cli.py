"""The command line keeps its word: exit codes, one sentence an error, a clean stdout, no debris."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

import onnx_lrsd.commands.optimize
from onnx_lrsd import cli
from onnx_lrsd.cli import making, upkeep
from onnx_lrsd.commands.doctor import Finding
from onnx_lrsd.errors import BudgetError
from onnx_lrsd.facts import Promise, Report
from onnx_lrsd.report.progress import PlainProgress
from onnx_lrsd.types import Choice, Form, Plan, Price

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "models" / "digits.onnx"
CALIB = ROOT / "models" / "digits_calib.npz"

Values = npt.NDArray[Any]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def a_model(weight: Values | None = None) -> onnx.ModelProto:
    """One 3 x 3 convolution of 64 channels on 16 x 16, of low rank where no weight is given."""
    if weight is None:
        rng = np.random.default_rng(0)
        weight = (rng.standard_normal((64, 8)) @ rng.standard_normal((8, 576)) / 50).reshape(64, 64, 3, 3)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64, 16, 16]) for name in "xy"]
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])]
    tensors = [numpy_helper.from_array(np.asarray(weight, np.float32), "w")]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def some_data(count: int = 12) -> Values:
    return np.random.default_rng(1).standard_normal((count, 64, 16, 16)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with model.onnx and calib.npz."""
    onnx.save(a_model(), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=some_data())
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """``optimize`` replaced by one that notes what it was given and returns what ``answer`` holds."""
    called: dict[str, Any] = {"kept": True, "raises": None}

    def optimize(model: object, calibration: object, **options: Any) -> onnx_lrsd.Result:
        called.update(options, model=model, calibration=calibration)
        if called["raises"] is not None:
            raise called["raises"]
        promise = Promise("ratio", 2.0, 1.5, called["kept"])
        report = Report(
            input=str(model),
            output=str(options["output"]),
            target="onnxruntime",
            cost="macs",
            calibration_samples=0,
            calibration_source="",
            verification=None,
            promise=promise,
            layers=(),
        )
        price = Price(1, 1, 4)
        plan = Plan("onnxruntime", "macs", {"y": Choice(Form(), 0.0, price, price)})
        return onnx_lrsd.Result(onnx_lrsd.Model(onnx.ModelProto()), report, plan)

    monkeypatch.setattr(making, "optimize", optimize)
    yield called


# What a run is


def test_the_main_job_writes_beside_the_model(folder: Path) -> None:
    result = run("optimize", folder / "model.onnx", "--calib", folder / "calib.npz", "--ratio", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "kept" in result.stderr
    onnx.checker.check_model(str(folder / "model.lrsd.onnx"), full_check=True)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "calib.npz", "model.lrsd.onnx"}


def test_a_saved_plan_replays_to_the_same_bytes(folder: Path) -> None:
    # Of this target nothing is timed, so a busy machine cannot hand the original back.
    common = "optimize", folder / "model.onnx", "--calib", folder / "calib.npz", "-q"
    asked = "--target", "tensorrt", "--ratio", 2, "--save-plan", folder / "plan.json"
    first = run(*common, *asked, "-o", folder / "first.onnx")
    second = run(*common, "--plan", folder / "plan.json", "-o", folder / "second.onnx")
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert first.output == second.output == ""
    assert (folder / "first.onnx").read_bytes() == (folder / "second.onnx").read_bytes()


def test_a_dry_run_writes_no_model_and_the_plan_may_go_to_stdout(folder: Path) -> None:
    before = set(folder.iterdir())
    result = run(
        *("optimize", folder / "model.onnx", "--calib", folder / "calib.npz"),
        *("--ratio", 2, "--dry-run", "--save-plan", "-"),
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["layers"]["y"]["kind"] != "dense"
    assert set(folder.iterdir()) == before


def test_inspect_and_compare_keep_stdout_for_json(folder: Path) -> None:
    model = folder / "model.onnx"
    found = run("inspect", model, "--json", "-")
    assert [layer["name"] for layer in json.loads(found.stdout)["layers"]] == ["conv"]
    assert "conv" in found.stderr
    same = run("compare", model, model, "--data", folder / "calib.npz", "--json", "-", "-q")
    facts = json.loads(same.stdout)
    assert facts["ratio"]["macs"] == 1
    (output,) = facts["outputs"]
    assert (output["name"], output["relative_error"], output["error_interval"]) == ("y", 0.0, [0.0, 0.0])
    (group,) = output["groups"]
    assert (group["name"], group["slice"], group["interval"]) == ("y", "", [0.0, 0.0])
    assert same.stderr == ""


def test_options_reach_the_api(fake: dict[str, Any], folder: Path) -> None:
    result = run(
        *("optimize", folder / "model.onnx", "--cost", "params", "--ratio", 3, "--forms", "channel,spatial"),
        *(
            "--include",
            "a",
            "--exclude",
            "b",
            "--samples",
            7,
            "--seed",
            5,
            "--device",
            "cpu",
            "--eval",
            "e.npz",
        ),
    )
    assert result.exit_code == 0, result.stderr
    wanted = {
        "model": folder / "model.onnx",
        "calibration": None,
        "evaluation": "e.npz",
        "output": folder / "model.lrsd.onnx",
        "cost": "parameters",
        "ratio": 3.0,
        "max_error": None,
        "forms": ("channel", "spatial"),
        "include": "a",
        "exclude": "b",
        "samples": 7,
        "seed": 5,
        "device": "cpu",
        "target": None,  # the default
        "dry_run": False,
        "plan": None,
    }
    assert {key: fake[key] for key in wanted} == wanted
    assert isinstance(fake["progress"], PlainProgress)  # stderr is no terminal here
    run("optimize", folder / "model.onnx", "-q")
    assert fake["progress"] is None


def test_every_option_is_an_option_of_the_api() -> None:
    fields = set(onnx_lrsd.Options.__dataclass_fields__)
    assert isinstance(cli.main, click.Group)
    assert fields <= {parameter.name for parameter in cli.main.commands["optimize"].params}


WRONG = [
    ({"ratio": -1}, "ratio=-1 is not a number of at least 1", "--ratio -1"),
    ({"ratio": 0.5}, "ratio=0.5 is not", "--ratio 0.5"),
    ({"ratio": float("nan")}, "ratio=nan is not", "--ratio nan"),
    ({"ratio": "2"}, "ratio='2' is not", ""),
    ({"ratio": True}, "ratio=True is not", ""),
    ({"max_error": 7}, "max_error=7 is not a number from 0 to 1", "--max-error 7"),
    ({"max_drop": -1}, "max_drop=-1 is not a number from 0 to 100", "--max-drop -1"),
    ({"device": "gpu"}, "device='gpu' is none of auto, cpu, cuda", "--device gpu"),
    ({"target": "abacus"}, "target='abacus' is none of", "--target abacus"),
    ({"cost": "money"}, "cost='money' is none of", "--cost money"),
    ({"weights": "int99"}, "weights='int99' is none of", "--weights int99"),
    ({"weights": "int4"}, "weights goes with target='size'", "--weights int4"),
    ({"forms": ("foo",)}, "forms=('foo',) is no list of", "--forms foo"),
    ({"forms": "channel"}, "forms='channel' is no list of", ""),
    ({"forms": ()}, "forms=() is no list of", ""),
    ({"include": "("}, "include='(' is not a regular expression", "--include ("),
    ({"exclude": "{x}(?{"}, "exclude='{x}(?{' is not a regular expression", "--exclude {x}(?{"),
    ({"samples": 0}, "samples=0 is not a whole number of at least 1", "--samples 0"),
    ({"samples": 1.5}, "samples=1.5 is not", ""),
    ({"seed": -1}, "seed=-1 is not", "--seed -1"),
    ({"metric": "top1"}, "metric goes with max_drop", "--metric top1"),
    ({"metric": "f1", "max_drop": 1}, "metric='f1' is neither top1 nor a function", ""),
    ({"ratio": 2, "max_drop": 1}, "ratio and max_drop exclude each other", "--ratio 2 --max-drop 1"),
    ({"max_drop": 1}, "max_drop needs labelled samples: give them with evaluation.", "--max-drop 1"),
    ({"int8": True}, "int8 takes the ranges of activations from samples", "--int8"),
    ({"int8": True, "target": "size"}, "not for target='size'", "--int8 --target size"),
    ({"cost": "latency", "target": "size"}, "cost='latency' cannot", "--cost latency --target size"),
    ({"dry_run": True, "output": Path("o")}, "output cannot go with dry_run", "--dry-run -o o"),
]


@pytest.mark.parametrize(("options", "says", "flags"), WRONG, ids=[entry[1] for entry in WRONG])
def test_a_wrong_option_is_named_as_the_caller_wrote_it(
    folder: Path, options: dict[str, Any], says: str, flags: str
) -> None:
    with pytest.raises(onnx_lrsd.OptionError) as caught:
        onnx_lrsd.optimize(folder / "model.onnx", **options)
    assert says in str(caught.value) and caught.value.code == 2
    assert re.search(r": [^:]+\.$", str(caught.value)), "it ends with the remedy"
    if flags:
        result = run("optimize", folder / "model.onnx", *flags.split())
        assert result.exit_code == 2 and flags.split()[0] in result.stderr, result.stderr
        assert "=" not in result.stderr


@pytest.mark.parametrize("option", ["target", "cost", "forms", "include"])
def test_a_plan_settles_what_it_holds(folder: Path, option: str) -> None:
    values = {"target": "size", "cost": "bytes", "forms": ("channel",), "include": "x"}
    plan = onnx_lrsd.plan_from_json(PLAN)
    with pytest.raises(onnx_lrsd.OptionError, match=f"{option} cannot go with plan"):
        onnx_lrsd.optimize(folder / "model.onnx", plan=plan, **{option: values[option]})  # type: ignore[arg-type]


def test_optimize_spells_out_every_option() -> None:
    parameters = inspect.signature(onnx_lrsd.optimize).parameters
    options = onnx_lrsd.Options.__dataclass_fields__
    assert options.keys() <= parameters.keys()
    assert all(parameters[name].default == field.default for name, field in options.items())
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


# Exit codes


def test_a_broken_promise_exits_3_and_says_so(fake: dict[str, Any], folder: Path) -> None:
    fake["kept"] = False
    result = run("optimize", folder / "model.onnx", "--ratio", 2, "--json", folder / "report.json", "-q")
    assert result.exit_code == 3
    assert "2 was asked, 1.5 was reached" in result.stderr
    assert json.loads((folder / "report.json").read_text())["promise"]["kept"] is False


def test_a_budget_out_of_reach_exits_3(fake: dict[str, Any], folder: Path) -> None:
    fake["raises"] = BudgetError("Out of reach; ask for less.")
    result = run("optimize", folder / "model.onnx", "--ratio", 2)
    assert (result.exit_code, result.stderr) == (3, "Error: Out of reach; ask for less.\n")


def test_an_interrupt_exits_130(fake: dict[str, Any], folder: Path) -> None:
    fake["raises"] = KeyboardInterrupt()
    result = run("optimize", folder / "model.onnx")
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def test_a_bug_is_one_line_and_a_traceback_with_v(fake: dict[str, Any], folder: Path) -> None:
    fake["raises"] = ZeroDivisionError("of a\nkind")
    short = run("optimize", folder / "model.onnx")
    assert short.exit_code == 1
    assert short.stderr.count("\n") == 1
    assert "this is a bug in onnx-lrsd (ZeroDivisionError: of a kind)" in short.stderr
    assert "Traceback" in run("optimize", folder / "model.onnx", "-v").stderr
    assert "Traceback" not in run("optimize", folder / "model.onnx").stderr


def _heed_interrupts() -> None:
    """A shell has what it starts in the background ignore them, and its children too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


A_STAGE = re.compile(r"[a-z].* \d+ %(, about \d+ (s|min) left)?|fit \d+ of .+|check of what was found")
"""A line of progress, of whichever stage had begun when the first was due."""


def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    command = [sys.executable, "-m", "onnx_lrsd", "optimize", DIGITS, "--calib", CALIB, "-o", output]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()  # the work has begun
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert A_STAGE.fullmatch(first.strip()), first + said
    assert process.returncode == 130 and said.endswith("Interrupted.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        "--ratio 2 --max-error 0.1",
        "--ratio 2 --plan plan.json",
        "--plan plan.json --forms channel",
        "--plan plan.json --cost bytes",
        "--plan plan.json --include x",
        "--ratio 0.5",
        "--ratio many",
        "--max-error 2",
        "--forms low-rank",
        "--include (",
        "--samples 0",
        "--cost money",
        "--target abacus",
        "--device tpu",
        "--dry-run -o out.onnx",
        "--json - --save-plan -",
        "--nonsense",
    ],
)
def test_wrong_usage_exits_2(fake: dict[str, Any], folder: Path, options: str) -> None:
    result = run("optimize", folder / "model.onnx", *options.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    assert "model" not in fake


# Bad input: one sentence with the remedy, exit code 1, and no debris


def _no_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def _not_onnx(folder: Path) -> None:
    (folder / "model.onnx").write_text("weights, honestly")


def _truncated(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])


def _empty_model(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")


def _folder_for_model(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()


def _no_such_output(folder: Path) -> None:
    proto = a_model()
    proto.graph.output[0].name = "nowhere"
    onnx.save(proto, folder / "model.onnx")


def _damaged_weight(folder: Path) -> None:
    proto = a_model()
    proto.graph.initializer[0].raw_data = b"abc"
    onnx.save(proto, folder / "model.onnx")


def _weight_of_no_type(folder: Path) -> None:
    proto = a_model()
    proto.graph.initializer[0].data_type = 99
    onnx.save(proto, folder / "model.onnx")


def _external_data_nowhere(folder: Path, offset: str = "x") -> None:
    proto = a_model()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "model.data", "offset": offset}.items():
        weight.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


def _external_data_missing(folder: Path) -> None:
    _external_data_nowhere(folder, "0")


def _sizes_of_zero(folder: Path) -> None:
    proto = a_model()
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 0
    onnx.save(proto, folder / "model.onnx")


def _no_layers(folder: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64, 16, 16]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "model.onnx")


def _nan_in_weights(folder: Path) -> None:
    weight = np.zeros((64, 64, 3, 3), np.float32)
    weight[0, 0, 0, 0] = np.nan
    onnx.save(a_model(weight), folder / "model.onnx")


def _no_data(folder: Path) -> None:
    (folder / "calib.npz").unlink()


def _damaged_data(folder: Path) -> None:
    (folder / "calib.npz").write_bytes(b"PK\x03\x04 and then nothing")


def _pickled_data(folder: Path) -> None:
    np.savez(folder / "calib.npz", x=np.array([{"a": 1}, None], dtype=object))


def _data(**arrays: Values) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "calib.npz", **arrays)  # type: ignore[arg-type]


def _with_nan(data: Values) -> Values:
    data[3, 2, 1, 0] = np.nan
    return data


BAD_INPUT = {
    "no model": (_no_model, "model.onnx"),
    "not ONNX": (_not_onnx, "model.onnx"),
    "a truncated model": (_truncated, "model.onnx"),
    "an empty model": (_empty_model, "model.onnx"),
    "a folder": (_folder_for_model, "model.onnx"),
    "no such output": (_no_such_output, "model.onnx"),
    "a damaged weight": (_damaged_weight, "model.onnx"),
    "a weight of no type": (_weight_of_no_type, "model.onnx"),
    "an offset that is none": (_external_data_nowhere, "model.onnx"),
    "no data file": (_external_data_missing, "model.data"),
    "sizes of zero": (_sizes_of_zero, "samples"),
    "no layers": (_no_layers, ""),
    "NaN in weights": (_nan_in_weights, ""),
    "no data": (_no_data, "calib.npz"),
    "damaged data": (_damaged_data, "calib.npz"),
    "pickled data": (_pickled_data, "calib.npz"),
    "empty data": (_data(x=some_data(0)), "calib.npz"),
    "no arrays": (_data(), "calib.npz"),
    "one sample": (_data(x=some_data(1)), "calib.npz"),
    "a wrong name": (_data(x=some_data(), z=some_data()), "x float32[N, 64, 16, 16]"),
    "a wrong shape": (_data(x=some_data()[:, :3]), "x float32[N, 64, 16, 16]"),
    "a wrong rank": (_data(x=some_data()[0, 0]), "x float32[N, 64, 16, 16]"),
    "NaN in data": (_data(x=_with_nan(some_data())), "calib.npz"),
    "text for data": (_data(x=np.array(["a", "b"])), "calib.npz"),
}


def _assert_one_sentence(result: Result, mention: object = "") -> None:
    assert result.exit_code == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith((".\n", ").\n"))
    assert "bug" not in result.stderr
    assert str(mention) in result.stderr


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(folder: Path, case: str) -> None:
    spoil, mention = BAD_INPUT[case]
    spoil(folder)
    before = set(folder.iterdir())
    result = run("optimize", folder / "model.onnx", "--calib", folder / "calib.npz", "--ratio", 2)
    _assert_one_sentence(result, mention)
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("option", ["--output", "--json", "--save-plan"])
def test_an_output_that_cannot_be_written_is_found_out_before_the_work(
    fake: dict[str, Any], folder: Path, option: str
) -> None:
    for place in (folder / "nowhere" / "file", folder):
        result = run("optimize", folder / "model.onnx", option, place)
        _assert_one_sentence(result, folder)
        assert "model" not in fake


@pytest.mark.parametrize("option", ["--output", "--json", "--save-plan"])
def test_the_model_itself_is_never_overwritten(fake: dict[str, Any], folder: Path, option: str) -> None:
    content = (folder / "model.onnx").read_bytes()
    _assert_one_sentence(run("optimize", folder / "model.onnx", option, folder / "model.onnx"), "model.onnx")
    assert (folder / "model.onnx").read_bytes() == content
    assert "model" not in fake


@pytest.mark.parametrize("name", ["calib.npz", "eval.npz", "plan.json"])
def test_nothing_that_is_read_is_overwritten(fake: dict[str, Any], folder: Path, name: str) -> None:
    options = {"calib.npz": "--calib", "eval.npz": "--eval", "plan.json": "--plan"}
    common = "optimize", folder / "model.onnx", options[name], folder / name
    _assert_one_sentence(run(*common, "-o", folder / name), name)
    assert "model" not in fake


def test_two_outputs_are_two_files(fake: dict[str, Any], folder: Path) -> None:
    same = folder / "out"
    _assert_one_sentence(run("optimize", folder / "model.onnx", "-o", same, "--json", same), "out")
    assert "model" not in fake


@pytest.mark.skipif(os.name != "posix", reason="needs named pipes")
def test_what_is_no_ordinary_file_is_not_replaced(fake: dict[str, Any], folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    _assert_one_sentence(run("optimize", folder / "model.onnx", "-o", folder / "pipe"), "pipe")
    with pytest.raises(onnx_lrsd.LrsdError, match="ordinary"):
        onnx_lrsd.save(onnx_lrsd.load(folder / "model.onnx"), folder / "pipe")
    assert (folder / "pipe").is_fifo()


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="needs a user who may not write everywhere"
)
def test_a_folder_without_permission_is_one_sentence(folder: Path) -> None:
    folder.chmod(0o500)
    try:
        _assert_one_sentence(run("optimize", folder / "model.onnx"), folder)
    finally:
        folder.chmod(0o700)


PLAN = (
    '{"schema": 1, "target": "onnxruntime", "cost": "macs", "layers": {"y": {"kind": "channel", "rank": 8}}}'
)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (PLAN, "{"),
        ("channel", "chanel"),
        ('"y"', '"z"'),
        ('"rank": 8', '"rank": 9999'),
        ('"rank": 8', '"rank": 8, "channels": 65'),
        ("onnxruntime", "abacus"),
    ],
)
def test_a_bad_plan_is_one_sentence(folder: Path, right: str, wrong: str) -> None:
    (folder / "plan.json").write_text(PLAN.replace(right, wrong))
    common = "optimize", folder / "model.onnx", "--calib", folder / "calib.npz"
    _assert_one_sentence(run(*common, "--plan", folder / "plan.json"))
    assert not (folder / "model.lrsd.onnx").exists()


def test_a_missing_plan_is_one_sentence(folder: Path) -> None:
    _assert_one_sentence(run("optimize", folder / "model.onnx", "--plan", folder / "plan.json"), "plan.json")


def test_comparing_what_does_not_fit_is_one_sentence(folder: Path) -> None:
    _assert_one_sentence(run("compare", folder / "model.onnx", DIGITS, "--data", folder / "calib.npz"))
    _assert_one_sentence(run("inspect", folder / "calib.npz"), "calib.npz")


# doctor


def test_doctor_says_what_works() -> None:
    result = run("doctor")
    assert "onnxruntime" in result.stdout
    assert result.stderr == ""


def test_doctor_exits_1_when_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        upkeep, "examine", lambda: (Finding("inference", False, "fails"), Finding("gpu", None, "none"))
    )
    result = run("doctor")
    assert (result.exit_code, result.stdout.split()[:2]) == (1, ["BAD", "inference"])


def test_doctor_sees_two_runtimes_that_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["onnxruntime", "onnxruntime-gpu"]
    monkeypatch.setattr(
        "onnx_lrsd.commands.doctor._distributions", lambda name: both if name == "onnxruntime" else []
    )
    result = run("doctor")
    assert result.exit_code == 1
    assert "pip uninstall onnxruntime onnxruntime-gpu" in result.stdout

"""Damaged and hostile files: each a clear error, nothing executed, nothing half-loaded."""

import copy
import hashlib
import json
import os
import pickle
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.collapse import files
from lnr_prune.errors import PlanError
from lnr_prune.graph.module import named_tensors
from lnr_prune.runtime.codec import LARGEST
from tests.helpers import held

HUGE = 2**40
TENSORS = ("plan", "original", "tensors")
EXECUTED: list[str] = []


def network() -> nn.Module:
    return held.HeldHeads().eval()


class Trap:
    """A pickle that tells when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return EXECUTED.append, ("pickle",)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The parts of a file: its bytes, the record, the tensors."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    pruned = lnr.prune(network(), [torch.randn(8, 5, 16)], lnr.Keep(0.5))
    pruned.save(path)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    return {"raw": raw, "record": json.loads(header["__metadata__"]["lnr_prune"]), "header": header,
            "tensors": {name: tensor.detach() for name, tensor in named_tensors(pruned.model).items()}}  # fmt: skip


Damage = tuple[str, str, Callable[[dict[str, Any]], bytes]]
"""What is wrong, what the error must name, and the file."""


def with_record(*path: Any, put: Any = None, drop: bool = False) -> Callable[[dict[str, Any]], bytes]:
    """The file with one entry of its record changed."""

    def file(good: dict[str, Any]) -> bytes:
        record = copy.deepcopy(good["record"])
        holder = record
        for name in path[:-1]:
            holder = holder[name]
        if drop:
            del holder[path[-1]]
        else:
            holder[path[-1]] = put
        return sealed(good["tensors"], record)

    return file


def sealed(tensors: dict[str, Tensor], record: dict[str, Any]) -> bytes:
    """A file with the hash of its record made good."""
    record.pop("sha256", None)
    record["sha256"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return save(tensors, {"lnr_prune": json.dumps(record)})


def with_text(text: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda good: save(good["tensors"], {"lnr_prune": text})


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[dict[str, Any]], bytes]:
    def file(good: dict[str, Any]) -> bytes:
        tensors = dict(good["tensors"])
        change(tensors)
        return save(tensors, {"lnr_prune": json.dumps(good["record"])})

    return file


def with_header(change: Callable[[dict[str, Any]], object], length: int | None = None) -> Callable[..., bytes]:
    """The file with its safetensors header changed, its data as it was."""

    def file(good: dict[str, Any]) -> bytes:
        header = copy.deepcopy(good["header"])
        change(header)
        text = json.dumps(header).encode()
        old = struct.unpack("<Q", good["raw"][:8])[0]
        return struct.pack("<Q", len(text) if length is None else length) + text + good["raw"][8 + old :]

    return file


def sizes(**entries: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["qkv.bias"].update(entries)


def cut(end: int) -> Callable[[dict[str, Any]], bytes]:
    return lambda good: good["raw"][:end]


def flipped(position: int) -> Callable[[dict[str, Any]], bytes]:
    def file(good: dict[str, Any]) -> bytes:
        raw = bytearray(good["raw"])
        raw[position] ^= 0x10
        return bytes(raw)

    return file


def rows(put: Sequence[Any]) -> Callable[[dict[str, Any]], bytes]:
    return with_record("plan", "indices", "proj.weight", "1", put=list(put))


def attribute(name: str, value: Any, module: str = "") -> Callable[[dict[str, Any]], bytes]:
    return with_record("plan", "attributes", put={module: {name: value}})


def twice(good: dict[str, Any]) -> bytes:
    text = json.dumps(good["record"])
    return save(good["tensors"], {"lnr_prune": '{"format": 1, ' + text[1:]})


def another_model(good: dict[str, Any]) -> bytes:
    """A consistent file, of a model that merely has the same layers' names."""
    record = copy.deepcopy(good["record"])
    record["plan"]["original"]["modules"]["qkv"] = "Conv2d"
    return sealed(good["tensors"], record)


def edited(good: dict[str, Any]) -> bytes:
    """Legal, but not what was written."""
    record = copy.deepcopy(good["record"])
    record["plan"]["attributes"][""]["num_heads"] += 1
    return save(good["tensors"], {"lnr_prune": json.dumps(record)})


DAMAGES: list[Damage] = [
    # the container
    ("empty", "not JSON|neither", cut(0)),
    ("one byte", "not JSON|neither", cut(1)),
    ("a header's length alone", "not a safetensors file", cut(8)),
    ("cut in the header", "damaged or cut off", cut(100)),
    ("cut in the data", "damaged or cut off", cut(-1)),
    ("cut to the header", "damaged or cut off", lambda g: g["raw"][: 8 + struct.unpack("<Q", g["raw"][:8])[0]]),
    ("more data than the header says", "damaged or cut off", lambda g: g["raw"] + b"\0"),
    ("a bit flipped in the data", "damaged: their SHA-256", flipped(-5)),
    ("a bit flipped in the header", "damaged|not JSON|record|expected", flipped(30)),
    ("a pickle", "not a safetensors file", lambda _: pickle.dumps(Trap())),
    ("a zip, as torch.save writes", "not a safetensors file", lambda _: b"PK\x03\x04" + b"\0" * 100),
    ("random bytes", "not a safetensors file", lambda _: bytes(range(256)) * 8),
    ("a header of 2^63 bytes", "not a safetensors file", with_header(lambda _: None, length=2**63 + 1)),
    ("a header longer than the file", "not a safetensors file", with_header(lambda _: None, length=10**7)),
    ("a header that is no JSON", "not a safetensors file", lambda _: struct.pack("<Q", 4) + b"nope"),
    ("a tensor of 2^40 rows", "not a safetensors file", with_header(sizes(shape=[HUGE, 16]))),
    ("a shape that overflows", "not a safetensors file", with_header(sizes(shape=[2**62, 8]))),
    ("overlapping tensors", "not a safetensors", with_header(sizes(data_offsets=[0, 96]))),
    ("offsets beyond the file", "not a safetensors", with_header(sizes(data_offsets=[0, HUGE]))),
    ("negative offsets", "not a safetensors", with_header(sizes(data_offsets=[-4, 92]))),
    ("an unknown dtype", "not a safetensors file", with_header(sizes(dtype="OBJECT"))),
    ("no record", "without a record of lnr-prune", with_header(lambda h: h.pop("__metadata__"))),
    # the tensors
    ("a tensor is missing", "lacks the tensor 'qkv.bias'", with_tensors(lambda t: t.pop("qkv.bias"))),
    ("a tensor too many", "a tensor 'x', which the original", with_tensors(lambda t: t.update(x=torch.ones(1)))),
    ("a path as a name", r"'../../x', which", with_tensors(lambda t: t.update({"../../x": torch.ones(1)}))),
    ("a wrong shape", r"'qkv.bias' is of shape \(5,\)", with_tensors(lambda t: t.update({"qkv.bias": torch.ones(5)}))),
    ("a wrong rank", "'qkv.bias' is of shape", with_tensors(lambda t: t.update({"qkv.bias": torch.ones(24, 1)}))),
    ("ints for floats", "'qkv.bias' is int64", with_tensors(lambda t: t.update({"qkv.bias": t["qkv.bias"].long()}))),
    ("other values", "SHA-256", with_tensors(lambda t: t.update({"qkv.bias": t["qkv.bias"] + 1}))),
    # the record's JSON
    ("no JSON", "its record is not JSON", with_text("{")),
    ("a list", "the record is a list of 0 entries, expected an object", with_text("[]")),
    ("nested without end", "its record is not JSON", with_text("[" * 10**5)),
    ("an int of 10^5 digits", "its record is not JSON", with_text('{"format": ' + "9" * 10**5 + "}")),
    ("an entry twice", "'format' appears twice", twice),
    ("far too long", "characters, expected at most", with_text(" " * (LARGEST + 1))),
    ("NaN for a version", "of format nan, expected 1", with_text('{"format": NaN}')),
    ("a newer format", "of format 2, expected 1: update lnr-prune", with_record("format", put=2)),
    ("true for 1", "record.format is True, expected an int", with_record("format", put=True)),
    ("no plan", "lacks its entry 'plan'", with_record("plan", drop=True)),
    ("no report", "has no report", with_record("report", drop=True)),
    ("no fingerprint", "does not say what architecture", with_record("plan", "original", put=None)),
    ("an unknown entry", "unknown entry '__reduce__'", with_record("__reduce__", put="os.system")),
    ("an unknown entry of the plan", "plan has an unknown entry 'code'", with_record("plan", "code", put="x")),
    ("a report of words", "report.error is 'much', expected a number", with_record("report", "error", put="much")),
    ("a row of the report", r"groups\[0\] is a list", with_record("report", "groups", put=[[]])),
    ("half a row", r"groups\[0\] lacks its entry 'name'", with_record("report", "groups", put=[{}])),
    ("a number for a reason", r"frozen\['a'\] is 1, expected", with_record("report", "frozen", put={"a": 1})),
    ("a huge count", "params_after is an int of 71 bits", with_record("report", "params_after", put=2**70)),
    ("a number for a hash", "tensors is 0, expected a string", with_record("tensors", put=0)),
    ("an edited record", "its record is damaged", edited),
    ("graph, says a word", "as_graph is 'yes', expected a bool", with_record("as_graph", put="yes")),
    # the plan
    ("indices that descend", "of dimension 1 of 'proj.weight' are not ascending", rows([3, 2, 1])),
    ("indices twice", "of 'proj.weight' are not ascending", rows([1, 1, 2])),
    ("negative indices", "from 0 to 15", rows([-1, 0])),
    ("indices beyond the end", "from 0 to 15", rows([0, 16])),
    ("huge indices", "from 0 to 15", rows([0, HUGE])),
    ("indices beyond 64 bits", "an int of 71 bits", rows([2**70])),
    ("no index", "at least one", rows([])),
    ("fractions", r"\[0\] is 0.5, expected an int", rows([0.5])),
    ("words", r"\[0\] is '0', expected an int", rows(["0"])),
    ("bools", r"\[0\] is True, expected an int", rows([True])),
    ("fewer indices than the tensor has", r"'proj.weight' is of shape \(16, 8\), expected \(16, 1\)", rows([0])),
    ("a dimension too many", "of dimension 2 of", with_record("plan", "indices", "proj.weight", "2", put=[0])),
    ("a negative dimension", "an entry '-1'", with_record("plan", "indices", "proj.weight", "-1", put=[0])),
    ("a dimension that is a word", "an entry 'x'", with_record("plan", "indices", "proj.weight", "x", put=[0])),
    ("a parameter that is not there", "of dimension 0 of 'a'", with_record("plan", "indices", "a", put={"0": [0]})),
    ("an unknown group", "channel group '/etc/passwd'", with_record("plan", "channels", put={"/etc/passwd": [0]})),
    ("a group's channels beyond the end", "group 'qkv'", with_record("plan", "channels", put={"qkv": [HUGE]})),
    ("a tie to nothing", "tied to 'b', which makes no", with_record("plan", "original", "tied", put={"a": "b"})),
    ("a negative size", "expected float32", with_record(*TENSORS, "proj.bias", "shape", put=[-16])),
    ("another model", "layer 'qkv' is Linear, expected Conv2d", another_model),
    # attributes
    ("a dunder", "attribute '__class__' of layer '' cannot become 1", attribute("__class__", 1)),
    ("a dunder inside", "'a.__init__' of layer '' cannot", attribute("a.__init__", 1)),
    ("code", r"attribute 'x=print\(\)' of", attribute("x=print()", 1)),
    ("a path", "attribute '../num_heads' of", attribute("../num_heads", 1)),
    ("an unknown attribute", "cannot become 1: it is not there", attribute("forward", 1)),
    ("a registry of torch", "'_parameters' of layer '' cannot", attribute("_parameters", 1)),
    ("zero heads", "'num_heads' of layer '' cannot become 0", attribute("num_heads", 0)),
    ("more heads than before", "cannot become 9: it is 4", attribute("num_heads", 9)),
    ("2^40 heads", "cannot become 1099511627776: it is 4", attribute("num_heads", HUGE)),
    ("heads in words", "is '2', expected an int", attribute("num_heads", "2")),
    ("an unknown layer", "of layer 'nowhere' cannot become 1", attribute("num_heads", 1, "nowhere")),
]  # fmt: skip


def whole(good: dict[str, Any], folder: Path) -> Path:
    (folder / "good.safetensors").write_bytes(good["raw"])
    return folder / "good.safetensors"


def test_the_file_is_good_before_it_is_damaged(good: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(lnr.load(whole(good, tmp_path), network()), held.HeldHeads)
    (tmp_path / "sealed").write_bytes(with_record("version", put="0.2")(good))
    assert isinstance(lnr.load(tmp_path / "sealed", network()), held.HeldHeads)


def test_there_are_fifty() -> None:
    assert len({name for name, _, _ in DAMAGES}) == len(DAMAGES) >= 50


@pytest.mark.parametrize(("name", "message", "damage"), DAMAGES, ids=[name for name, _, _ in DAMAGES])
@pytest.mark.parametrize("into", ["copy", "model"])
def test_a_damaged_file_is_refused(
    name: str, message: str, damage: Callable[[dict[str, Any]], bytes], into: str,
    good: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(damage(good))
    model = network()
    before = repr(model), dict(vars(model)), {key: id(tensor) for key, tensor in named_tensors(model).items()}
    values = copy.deepcopy(model.state_dict())
    loading = "not a safetensors" if path.stat().st_size < 8 else message
    with pytest.raises(PlanError, match=loading) as caught:
        lnr.load(path, model, into=into)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 400
    assert (repr(model), dict(vars(model)), {k: id(t) for k, t in named_tensors(model).items()}) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert EXECUTED == []
    assert capfd.readouterr() == ("", "")
    for read in (lnr.load_plan, files.report_of):  # these do not look at the tensors
        with suppress(PlanError):
            read(path)
    assert EXECUTED == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"{}", "of format None"),
        (b'{"format": 1}', "lacks its entry"),
        (b"\xff\xfe{}", "neither a safetensors file nor JSON"),
        (b"[1, 2]", "is a list of 2 entries"),
        (b'"' + b"a" * 1000 + b'"', r"is 'aaa\w+\.\.\., expected an object"),
        (b"null", "is None, expected an object"),
        (pickle.dumps(Trap()), "not a safetensors file"),
    ],
)
def test_a_damaged_plan_file_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with pytest.raises(PlanError, match=message):
        lnr.load_plan(path)
    assert EXECUTED == []


@pytest.mark.parametrize("change", ["channels", "indices", "attributes", "original"])
def test_a_plan_file_is_checked_like_a_model_file(change: str, good: dict[str, Any], tmp_path: Path) -> None:
    lnr.save_plan(tmp_path / "plan.json", lnr.load_plan(whole(good, tmp_path)))
    record = json.loads((tmp_path / "plan.json").read_text())
    record["plan"] = {**record["plan"], change: {"qkv": "x"}}
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(PlanError, match=rf"plan.{change}"):
        lnr.load_plan(tmp_path / "plan.json")


@given(position=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_another_model(position: int, bit: int, good: dict[str, Any]) -> None:
    raw = bytearray(good["raw"])
    raw[position % len(raw)] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "m").write_bytes(raw)
        with pytest.raises(PlanError):
            lnr.load(Path(folder, "m"), network())


@given(end=st.integers(0))
def test_a_file_that_is_cut_off_is_refused(end: int, good: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m")
        path.write_bytes(good["raw"][: end % len(good["raw"])])
        for read in (lnr.load_plan, lambda path: lnr.load(path, network())):
            with pytest.raises(PlanError):
                read(path)


def test_a_hostile_name_does_not_reach_the_terminal(good: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(with_record("report", "frozen", put={"a": "\x1b]0;owned\x07"})(good))
    assert "\x1b" not in str(files.report_of(path))


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lnr.load(tmp_path / "nowhere", network())
    with pytest.raises(PlanError, match="not a regular file"):
        lnr.load(tmp_path, network())
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(PlanError, match="not a regular file"):
            lnr.load_plan(tmp_path / "pipe")


def test_a_plan_that_fits_no_layer_leaves_the_model_whole(good: dict[str, Any]) -> None:
    """Legal in itself, but not something that a prune gives: caught when it is applied, or harmless."""
    plan = lnr.Plan({}, {"qkv.weight": {0: (0,)}, "proj.weight": {1: (0, 40)}})
    model = network()
    with pytest.raises(PlanError, match=r"indices of dimension 1 of 'proj.weight'"):
        lnr.apply_plan(plan, model, into="model")
    plan = lnr.Plan({}, {"qkv.weight": {0: (0,)}}, {"": {"num_heads": 5}})
    with pytest.raises(PlanError, match="sets attribute 'num_heads'"):
        lnr.apply_plan(plan, model, into="model")
    assert repr(model) == repr(network())

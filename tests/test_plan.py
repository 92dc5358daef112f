"""A plan on disk is the plan in memory; a damaged or foreign one is refused with the reason."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plan_of, site_plan, tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan, PlanError, documents
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.plan import FORMAT, weight_hash
from rana_compile.types import ConfigError, Site, Skipped


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))


@pytest.fixture
def plan(model: nn.Module) -> Plan:
    first = Site("0", "linear", ("0.weight",), 6, (4,))
    second = Site("1", "linear", ("1.weight",), 4, (5,), "block")
    basis = torch.linalg.qr(torch.randn(5, 3))[0]
    plan = plan_of(
        model,
        (first, "neuron", neuron_tensors(torch.rand(1, 6))),
        (second, "rank", {"output_basis": basis, "threshold": torch.rand(3)}),
    )
    skipped = (Skipped("head.weight", "excluded by head"),)
    return Plan(plan.sites, skipped, 0.5, 88.0, {"recipe": "auto", "divergence": 0.01})


def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "new" / "plan.safetensors")
    back = Plan.load(tmp_path / "new" / "plan.safetensors")
    assert [(s.site, s.family, s.live, s.flops_kept, s.error, s.weight_hash) for s in back.sites] == [
        (s.site, s.family, s.live, s.flops_kept, s.error, s.weight_hash) for s in plan.sites
    ]
    for a, b in zip(plan.sites, back.sites, strict=True):
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    assert (back.skipped, back.flops_asked, back.model_flops, back.info) == (
        plan.skipped,
        plan.flops_asked,
        plan.model_flops,
        plan.info,
    )
    assert (back.flops_kept, back.flops_kept_model) == (plan.flops_kept, plan.flops_kept_model)


def test_saving_leaves_no_other_file_and_replaces_whole(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    path.write_bytes(b"old")
    plan.save(path)
    plan.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_failed_save_leaves_the_old_file(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    before = path.read_bytes()

    def fails(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("rana_compile.plan.os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no plan at .*plan\.save"):
        Plan.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "newer", "tensor missing", "text"])
def test_damaged_files_are_refused(plan: Plan, tmp_path: Path, damage: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "plan.safetensors"
    plan.save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "text":
        path.write_text("not a plan")
    else:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}
        if damage == "foreign":
            metadata = {}
        elif damage == "newer":
            metadata["rana_compile"] = metadata["rana_compile"].replace(f'"format": {FORMAT}', '"format": 99')
        else:
            tensors.pop("1.output_basis")
        save_file(tensors, str(path), metadata)
    with pytest.raises(PlanError, match=r"not a readable plan|has format 99|is damaged"):
        Plan.load(path)


def test_a_bit_that_flips_anywhere_is_noticed_and_so_is_an_end_that_is_missing(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        with pytest.raises(PlanError):
            Plan.load(path)
        if i % 8 == 0:
            path.write_bytes(whole[:i])
            with pytest.raises(PlanError):
                Plan.load(path)


def rewritten(plan: Plan, path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Path:
    """A file that says something else and has the checksum of that: no accident."""
    document, tensors = plan.as_dict(), {f"{i}.{k}": t for i, s in enumerate(plan.sites) for k, t in s.tensors.items()}
    change(document, tensors)
    documents.save(path, "rana_compile", document, tensors)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.clear(), "has format None"),
        (lambda d, t: d.update(format=FORMAT + 1), "this version reads 2: calibrate again, or use the version of"),
        (lambda d, t: d.update(format="9" * 100), r"has format '9{19}; this"),
        (lambda d, t: d.update(sites=3), "'sites' is a int, not a list"),
        (lambda d, t: d.update(sites=[[1]]), "is damaged"),
        (lambda d, t: d.pop("info"), "it has no 'info'"),
        (lambda d, t: d.update(flops_asked=float("nan")), "'flops_asked' is nan"),
        (lambda d, t: d.update(model_flops=-1), "'model_flops' is -1"),
        (lambda d, t: d.update(model_flops=10**400), "is damaged"),
        (lambda d, t: d["sites"][0].update(family="oracle"), "no family is called 'oracle'; known: neuron, gated"),
        (lambda d, t: d["sites"][0].update(family=[]), "is damaged"),
        (lambda d, t: d["sites"][0].update(family="gated"), "no gate whose activation is known|it has no"),
        (lambda d, t: d["sites"][0].update(kind="all"), "'kind' cannot be 'all'"),
        (lambda d, t: d["sites"][0].update(d_in=-6), "'d_in' cannot be -6"),
        (lambda d, t: d["sites"][0].update(d_outs=[True]), "'d_outs' cannot be"),
        (lambda d, t: d["sites"][0].update(weights=["a", "b"]), "'d_outs' cannot be"),
        (lambda d, t: d["sites"][0].update(weights=[7]), "'weights' cannot be"),
        (lambda d, t: d["sites"][0].update(live=[]), "0 masks"),
        (lambda d, t: d["sites"][0].update(live=[-1]), "'live' is -1"),
        (lambda d, t: d["sites"][0].pop("weight_hash"), "it has no 'weight_hash'"),
        (lambda d, t: t.pop("1.output_basis"), "it has no '1.output_basis'"),
        (lambda d, t: t.update({"0.threshold": torch.zeros(2, 6)}), r"of shape \(2, 6\); expected .* shape \(1, 6\)"),
        (lambda d, t: t.update({"0.threshold": torch.zeros(1, 6, dtype=torch.int8)}), "'threshold' is a torch.int8"),
        (lambda d, t: t.update({"0.threshold": torch.full((1, 6), torch.nan)}), "none of them NaN"),
        (lambda d, t: t.update({"0.probe": torch.tensor(1.0)}), "is damaged"),
        (lambda d, t: t.update({"1.output_basis": torch.tensor(1.0)}), "is damaged"),
        (lambda d, t: t.update({"1.threshold": torch.zeros(4)}), r"expected .* shape \(3,\)"),
    ],
)
def test_what_cannot_be_true_of_a_plan_is_refused(plan: Plan, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.load(rewritten(plan, tmp_path / "plan", change))
    assert Plan.load(rewritten(plan, tmp_path / "plan", lambda d, t: None)).digest() == plan.digest()


@pytest.mark.parametrize("header", [b"\xff" * 7 + b"\x7f", (2**40).to_bytes(8, "little"), b""])
def test_hostile_sizes_are_refused_without_taking_the_memory(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "plan.safetensors"
    claims = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    for data in (header + claims, len(claims).to_bytes(8, "little") + claims):
        path.write_bytes(data)
        with pytest.raises(PlanError, match="not a readable plan"):
            Plan.load(path)


def test_check_names_what_differs(plan: Plan, model: nn.Module) -> None:
    plan.check(model)
    with pytest.raises(PlanError, match=r"no parameter '0\.weight'"):
        plan.check(nn.Linear(3, 3))
    with pytest.raises(PlanError, match="0: the plan was fitted on weights of shapes"):
        plan.check(nn.Sequential(nn.Linear(6, 9), nn.Linear(4, 5)))
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    with pytest.raises(PlanError, match="1: the weights are not those"):
        plan.check(model)
    with pytest.raises(PlanError, match=r"now torch\.bfloat16"):
        plan.check(model.bfloat16())


def test_a_plan_replaced_by_one_of_the_same_size_and_time_is_read_anew(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    state = path.stat()
    assert Plan.of(path).flops_asked == 0.5
    replace(plan, flops_asked=0.7).save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    assert Plan.of(path).flops_asked == 0.7


def test_of_reads_a_path_once_until_it_changes(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    first = Plan.of(path)
    assert Plan.of(str(path)) is first
    assert Plan.of(plan) is plan
    Plan(plan.sites[:1], (), 0.9, 88.0).save(path)
    assert Plan.of(path).flops_asked == 0.9
    with pytest.raises(ConfigError, match="the plan is a int"):
        Plan.of(3)


def test_flops_are_weighted_by_site_and_include_the_rest_of_the_model(model: nn.Module) -> None:
    site = Site("0", "linear", ("0.weight",), 6, (4,))
    entry = site_plan(site, "neuron", neuron_tensors(torch.zeros(1, 6)), [model[0].weight])  # keeps 0.5 of 48 FLOPs
    plan = Plan((entry,), (), 0.5, model_flops=88.0)
    assert plan.flops_kept == pytest.approx(0.5)
    assert plan.flops_kept_model == pytest.approx((24 + 40) / 88)


def test_text_lists_every_site_and_what_was_skipped(plan: Plan) -> None:
    text = str(plan)
    for word in ("neuron", "rank", "2 of 2 sites adapted", "skipped head.weight: excluded by head"):
        assert word in text


def test_loaded_plan_gives_identical_outputs(tmp_path: Path) -> None:
    model = tiny_llama()
    plan = rana_compile.calibrate(model, tokens(4), flops_budget=0.6, progress=False)
    plan.save(tmp_path / "plan.safetensors")
    (ids,) = tokens(1, seed=9)
    outputs = []
    for given in (plan, tmp_path / "plan.safetensors"):
        with rana_compile.adapted(model, given) as run:
            outputs.append(run(input_ids=ids).logits)
    assert torch.equal(*outputs)


def test_a_plan_lives_in_a_models_directory(plan: Plan, tmp_path: Path) -> None:
    plan.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rana_plan.safetensors"]
    for read in (Plan.from_pretrained(tmp_path), Plan.load(str(tmp_path)), Plan.of(tmp_path)):
        assert [s.weight_hash for s in read.sites] == [s.weight_hash for s in plan.sites]
    (tmp_path / "rana_plan.safetensors").unlink()
    with pytest.raises(PlanError, match=r"no plan at .*rana_plan\.safetensors"):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="no directory 'a/b', and no rana_plan"):
        Plan.from_pretrained("a/b")


def test_hashing_a_weight_leaves_its_storage_resizable() -> None:
    """FSDP frees and allocates storages in place."""
    weight = torch.randn(4, 4)
    weight_hash([weight])
    weight.untyped_storage().resize_(0)

"""A plan on disk is the plan in memory; a damaged or foreign one is refused with the reason."""

from pathlib import Path

import pytest
import torch
from support import plan_of, site_plan, tiny_llama, tokens
from torch import nn

import rana_compile
from rana_compile import Plan, PlanError
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


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        "7",
        f'{{"format": {FORMAT}}}',
        f'{{"format": {FORMAT}, "checksum": "", "sites": 3}}',
        '{"format": 1e999}',
        "1" * 10_000,
    ],
    ids=lambda text: text[:12],
)
def test_hostile_documents_are_refused(tmp_path: Path, text: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "plan.safetensors"
    save_file({"a": torch.zeros(1)}, str(path), {"rana_compile": text})
    with pytest.raises(PlanError):
        Plan.load(path)


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

"""Tests that a NaN or Inf stops the engine on every rank before it reaches weights, checkpoint
or rollout."""

import pytest
import torch

from qerl_verl.finite import first_nonfinite, gradient_norms, named_tensors

PARAMETER = "base_model.model.model.layers.1.self_attn.q_proj.lora_A"


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_engine_stops_and_names_step_and_tensor(run_engine, nvfp4_checkpoint, tmp_path, role):
    model_type, batch = {"actor": ("language_model", "advantages"), "critic": ("value_model", "returns")}[role]
    reports = run_engine(
        nvfp4_checkpoint,
        tmp_path / "r",
        world=2,
        model_type=model_type,
        poison=["loss", "gradient", "sync", "save"],
        save=str(tmp_path / "checkpoint"),
    )
    for report in reports:
        for what, seen in report.items():
            step = 2 if what in ("sync", "save") else 3  # two steps are over, the third is on
            assert seen["error"].startswith(f"NonFiniteError: [qerl] {role}, step {step}: "), (what, seen)
            assert seen["unchanged"], what
        assert f"the loss is nan; the first tensor that is not finite is batch.{batch}" in report["loss"]["error"]
        assert f"not finite: gradient of {PARAMETER}.default.weight" in report["gradient"]["error"]
        assert f"{PARAMETER}.weight is not finite" in report["sync"]["error"]
        assert f"{PARAMETER}.weight is not finite" in report["save"]["error"]
    assert not (tmp_path / "checkpoint").exists()


def test_the_first_tensor_is_named_and_what_is_no_float_is_passed_over():
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.tensor([float("inf")])], layout=torch.jagged)
    tensors = named_tensors(("output", {"ids": torch.ones(3, dtype=int), "a": torch.ones(2), "text": "nan"}),
                            ("batch", {"empty": torch.ones(0), "jagged": jagged, "b": torch.tensor(float("nan"))}))  # fmt: skip
    assert first_nonfinite(tensors) == "batch.jagged"
    assert first_nonfinite([("a", torch.ones(2))]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_whose_sum_is_too_large_are_finite(dtype):
    large = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    assert first_nonfinite([("large", large), ("negative", -large)]) is None
    assert first_nonfinite([("large", large), ("b", torch.tensor([1.0, float("-inf")], dtype=dtype))]) == "b"


def test_norms_of_the_gradients_there_are():
    module = torch.nn.Linear(2, 2)
    assert gradient_norms(module) == ([], None)
    module.weight.grad = torch.full((2, 2), 2.0, dtype=torch.bfloat16).float()
    names, norms = gradient_norms(module)
    assert names == ["weight"] and norms.tolist() == [4.0]

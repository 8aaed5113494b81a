"""Measured launch configurations: what is chosen, what is kept, and what a choice may be used
for."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from qerl_verl.kernels import autotune, hopper
from qerl_verl.kernels.backends import get_backend
from qerl_verl.kernels.hopper import measure, tuning
from qerl_verl.kernels.hopper.tuning import Tuned

TIMES = {"slow": 9.0, "good on a short look": 4.0, "fast": 5.0, "broken": None}


def fake_time(call, copies, replays):
    """Microseconds of a call that returns its candidate's name; a longer look corrects the
    first."""
    name = call(0)
    if TIMES[name] is None:
        raise RuntimeError("too many resources requested for launch")
    return 7.0 if replays > 2 and name == "good on a short look" else TIMES[name]


def calls_of(*names):
    return {name: lambda copy, name=name: name for name in names}


@pytest.fixture
def gpu_properties(monkeypatch, tmp_path):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("QERL_KERNEL_CACHE", str(tmp_path / "cache"))
    return properties


@pytest.fixture
def no_choices(monkeypatch):
    monkeypatch.setattr(tuning, "_tuned", {})
    tuning.choose.cache_clear()
    yield
    tuning.choose.cache_clear()


def test_the_finalists_are_measured_again():
    chosen, times = autotune.fastest(calls_of("slow", "good on a short look", "fast"), 2, fake_time)
    assert chosen == "fast" and times["good on a short look"] == 7.0


def test_a_call_that_fails_is_no_candidate():
    assert autotune.fastest(calls_of("broken", "slow"), 2, fake_time)[0] == "slow"
    with pytest.raises(RuntimeError, match="no launch configuration"):
        autotune.fastest(calls_of("broken"), 2, fake_time)


def test_missing_memory_is_no_property_of_a_candidate():
    def out_of_memory(call, copies, replays):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        autotune.fastest(calls_of("fast"), 2, out_of_memory)


def test_a_choice_is_measured_once_for_all_who_ask_at_the_same_time(gpu_properties):
    measured, results, ready = [], [], threading.Barrier(4)

    def measure_now():
        measured.append(1)
        return [[8, len(measured)]]

    def ask():
        ready.wait()
        results.append(autotune.recall("kind", 0, "v1", "64x64", measure_now))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1 and results == [[[8, 1]]] * 4


@pytest.mark.parametrize("change", ["version", "gpu", "problem", "nothing"])
def test_what_a_choice_belongs_to(gpu_properties, change):
    assert autotune.recall("kind", 0, "v1", "64x64", lambda: [[1]]) == [[1]]
    if change == "gpu":
        gpu_properties.name = "NVIDIA H200"
    version = "v2" if change == "version" else "v1"
    problem = "64x128" if change == "problem" else "64x64"
    again = autotune.recall("kind", 0, version, problem, lambda: [[2]])
    assert again == ([[1]] if change == "nothing" else [[2]])


def test_a_damaged_file_is_measured_again(gpu_properties, tmp_path):
    autotune.recall("kind", 0, "v1", "64x64", lambda: [[1]])
    (file,) = (tmp_path / "cache").rglob("64x64.json")
    file.write_text("[[1")
    assert autotune.recall("kind", 0, "v1", "64x64", lambda: [[2]]) == [[2]]
    assert json.loads(file.read_text()) == [[2]]


def test_a_cache_that_cannot_be_written_to_costs_the_measurement(gpu_properties, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert autotune.recall("kind", 0, "v1", "64x64", lambda: [[1]]) == [[1]]


def test_an_error_in_the_thread_reaches_the_caller():
    def fail():
        raise ValueError("from the thread")

    with pytest.raises(ValueError, match="from the thread"):
        autotune.in_thread(fail)
    assert autotune.in_thread(lambda: 3) == 3


@pytest.mark.parametrize("value, expected", [("off", False), ("0", False), ("on", True), ("", True)])
def test_the_environment_variable_turns_it_off(monkeypatch, value, expected):
    monkeypatch.setenv(autotune.SWITCH, value)
    assert autotune.enabled() is expected
    if not expected:
        assert get_backend("hopper").tune(torch.device("cuda", 0), 64, 64) is None


@pytest.mark.parametrize("ends", [None, (512,), (256, 384, 512)])
@pytest.mark.parametrize("n, k", [(512, 896), (512, 192), (512, 18944)])
def test_candidates_run_and_fit_between_projections(n, k, ends):
    align = tuning.alignment(ends)
    for m in (1, 8, 33, 64, 100, 200, 256, 300, 1000, 4096):
        plans = list(tuning.candidates(m, n, k, 132, align))
        assert plans
        for plan in plans:
            config = tuning.CONFIGS[plan.config]
            assert k % (64 * config.k_units) == 0
            assert not align or align % config.row_units == 0
            assert 1 <= plan.blocks <= tuning.tiles(plan.config, m, n) * tuning.steps(plan.config, k)
            assert plan.cluster <= tuning.steps(plan.config, k)


@pytest.mark.parametrize("ends", [None, (4864, 9728)])
def test_installed_choices_serve_every_number_of_tokens(no_choices, ends):
    n, k, align = 9728, 896, tuning.alignment(ends)
    limits = measure.LIMITS if ends is None else measure.LIMITS_WITH_ADAPTER
    choices = []
    for i, limit in enumerate(limits):
        plan = list(tuning.candidates(limit, n, k, 132, align))[-1 if i % 2 else 0]
        choices.append(Tuned(limit, plan.config, plan.blocks, plan.cluster, i % 2, 2))
    choices[-2] = Tuned(limits[-2], -1, 0, 0, 0, 4)
    tuning.install(n, k, align, choices)
    assert tuning.installed(n, k, align) and not tuning.installed(n, k, align + 1)
    for choice, limit in zip(choices, limits):
        plan = tuning.choose(limit, n, k, 132, align)
        assert plan[:3] == (choice.config, choice.blocks, choice.cluster)
        assert choice.config < 0 or tuning.choose_shrink(limit, n, k, 32, 132, align) == choice[4:]
    for m in range(1, 9000, 37):
        plan = tuning.choose(m, n, k, 132, align)
        if plan.config >= 0:
            assert 1 <= plan.blocks <= tuning.tiles(plan.config, m, n) * tuning.steps(plan.config, k)
            assert not align or align % tuning.CONFIGS[plan.config].row_units == 0
    between = limits[-3] + 1
    assert get_backend("hopper").decodes_first(between, n, k) is (ends is None)


def test_a_choice_of_another_shape_changes_nothing(no_choices):
    before = tuning.choose(64, 4608, 3584, 132)
    tuning.install(4608, 3648, 0, [Tuned(6144, -1, 0, 0, 0, 4)])
    assert tuning.choose(64, 4608, 3584, 132) == before


@pytest.mark.gpu
@pytest.mark.skipif(hopper.unsupported_device() is not None, reason=str(hopper.unsupported_device()))
@pytest.mark.parametrize("ends", [None, (640,), (384, 512, 640)])
def test_measured_launches_compute_the_same(no_choices, tmp_path, monkeypatch, ends):
    from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
    from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference
    from qerl_verl.kernels.packed_weight import PackedWeight

    monkeypatch.setenv("QERL_KERNEL_CACHE", str(tmp_path))
    n, k, rank, device = 640, 512, 32, torch.device("cuda", torch.cuda.current_device())
    assert "measured in" in hopper.tune(device, n, k, ends, rank)
    assert hopper.tune(device, n, k, ends, rank) is None
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scale = torch.randint(0x28, 0x40, (n, k // 16), dtype=torch.uint8, device=device)
    weight = block_values_nvfp4(packed, scale, torch.float64)
    prepacked = PackedWeight(*hopper.prepack(packed, scale), 1.0)
    for m in (1, 8, 33, 64, 100, 200, 256, 700, 1000, 4000):
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        expected = x.double() @ weight.t()
        if ends is None:
            y = hopper.gemm(x, prepacked)
        else:
            a = torch.randn(len(ends) * rank, k, device=device, dtype=torch.bfloat16) / k**0.5
            b = torch.randn(n, rank, device=device, dtype=torch.bfloat16)
            y = hopper.lora_gemm(x, prepacked, None, a, hopper.prepack_lora_b(b), ends, 1.0)
            expected = add_lora_reference(expected, x.double(), a.double(), b.double(), ends, 1.0)
        assert (y.double() - expected).norm() / expected.norm() < 4 * torch.finfo(torch.bfloat16).eps
    tuning._tuned.clear()
    assert hopper.tune(device, n, k, ends, rank) is None, "the cache has the choice"

"""Tests a policy that is set aside and restored, and what the engine passes to verl's checkpoint
engines.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.utils import fsdp_utils
from verl.workers import engine_workers

from qerl_verl.engine.adapter import AdapterEngineMixin
from qerl_verl.engine.detached import AdapterDetachWorker, restore_trained, save_trained
from qerl_verl.finite import NonFiniteError
from qerl_verl.lora.wire import CONFIG_TENSOR, take_config


@pytest.fixture
def module():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    return model


def worker(module):
    made = AdapterDetachWorker.__new__(AdapterDetachWorker)
    strategy = type("Config", (), {"actor": type("Actor", (), {"strategy": "fsdp2"})})
    made.config, made._strategy_handlers = strategy, None
    made.actor = type("Worker", (), {"engine": type("Engine", (), {"module": module})})
    return made


def test_a_policy_comes_back_bit_for_bit_after_updates_in_place(module):
    """Between two syncs verl numbers the policy of the last one 0, and the trained one
    differently."""
    made, first = worker(module), {n: p.detach().clone() for n, p in module.named_parameters()}
    made.save_model_to_cpu(0)
    with torch.no_grad():
        for p in module[1].parameters():
            p.add_(1)
    second = {n: p.detach().clone() for n, p in module.named_parameters()}
    made.save_model_to_cpu(1)
    made.restore_model_from_cpu(0)
    assert all(torch.equal(p, first[n]) for n, p in module.named_parameters())
    made.restore_model_from_cpu(1)
    made.clear_cpu_model(1)
    assert all(torch.equal(p, second[n]) for n, p in module.named_parameters())
    assert not torch.equal(first["1.weight"], second["1.weight"]) and list(made.cpu_saved_models) == [0]


def test_what_is_frozen_is_not_copied(module):
    saved, _ = save_trained(module)
    assert set(saved) == {"1.weight", "1.bias"}
    restore_trained(module, saved, None)


class Queued:
    """Stands for the device: a copy to the host that completes when someone waits for it."""

    def __init__(self, parameter, arriving):
        self.parameter, self.arriving = parameter, arriving

    def is_available(self):
        return True

    def synchronize(self):
        if self.arriving is not None:
            self.parameter.data.copy_(self.arriving)
            self.arriving = None


def test_copies_that_verl_has_queued_are_waited_for(module, monkeypatch):
    """Otherwise the host reads old values, or a later copy overwrites what was restored."""
    weight = module[1].weight
    for value in (7.0, 9.0):
        device = Queued(weight, torch.full_like(weight, value))
        monkeypatch.setattr(torch, "accelerator", device)
        if value == 7.0:
            saved, _ = save_trained(module)
        else:
            restore_trained(module, saved, None)
        device.synchronize()
    assert (saved["1.weight"] == 7).all() and (weight == 7).all()


@pytest.mark.gpu
def test_a_policy_that_verl_offloads_is_copied_whole():
    module = nn.Linear(8192, 8192).cuda()
    with torch.no_grad():
        module.weight.zero_()
        torch.cuda._sleep(2_000_000_000)  # cycles: the copy cannot begin before
        module.weight.fill_(3.0)
    fsdp_utils.offload_fsdp2_model_to_cpu(module, empty_cache=False)
    saved, _ = save_trained(module)
    assert (saved["weight"] == 3).all()


def test_verl_does_not_wait_for_its_copies_to_the_host():
    """Where this fails, verl may wait by itself."""
    for function in (fsdp_utils.offload_fsdp2_model_to_cpu, fsdp_utils.offload_fsdp_optimizer):
        source = inspect.getsource(function)
        assert "non_blocking=True" in source and "synchronize()" not in source


def test_verls_own_copy_of_what_is_on_the_host_is_no_copy():
    """The worker therefore has a copy of its own. Where this fails, verl copies by itself."""
    source = inspect.getsource(fsdp_utils.fsdp2_sharded_save_to_cpu)
    assert "local_cpu_tensor = local_gpu_tensor.detach().cpu()" in source
    assert AdapterDetachWorker._get_strategy_handlers is not DetachActorWorker._get_strategy_handlers


class StockEngine:
    """Stands for verl's engine, and records the requests."""

    def get_per_tensor_param(self, layered_summon=False, base_sync_done=False, **kwargs):
        assert base_sync_done, "the whole base was asked for"
        return self.tensors.items(), self.module.peft_config["default"].to_dict()


class Engine(AdapterEngineMixin, StockEngine):
    role = "actor"
    _is_offload_param = True  # so that verl's engine is asked

    def __init__(self, value=0.5):
        config = LoraConfig(r=8, lora_alpha=16, target_modules={"v_proj", "q_proj"})
        self.module = SimpleNamespace(peft_config={"default": config})
        self.tensors = {"a.lora_A.weight": torch.full((8, 4), value), "a.lora_B.weight": torch.zeros(4, 8)}


def test_a_colocated_sync_gets_the_adapter_and_its_configuration_beside_it():
    tensors, config = Engine().get_per_tensor_param(layered_summon=False, base_sync_done=True)
    assert [name for name, _ in tensors] == ["a.lora_A.weight", "a.lora_B.weight"] and config["r"] == 8


def test_a_checkpoint_engine_gets_the_adapter_with_its_configuration_last(monkeypatch):
    monkeypatch.setattr("qerl_verl.engine.adapter.get_device_id", lambda: "cpu")
    tensors, _ = Engine().get_per_tensor_param()  # as verl's update_weights calls it
    names = [name for name, _ in tensors]
    assert names == ["a.lora_A.weight", "a.lora_B.weight", CONFIG_TENSOR]
    config = take_config(dict(tensors))
    wanted = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    assert {name: config[name] for name in wanted} == wanted


def test_an_adapter_that_is_not_finite_does_not_leave_either_way():
    for done in (True, False):
        with pytest.raises(NonFiniteError, match="a.lora_A.weight is not finite"):
            Engine(float("nan")).get_per_tensor_param(base_sync_done=done)


def test_verl_drops_the_configuration_before_a_checkpoint_engine():
    """It therefore travels among the tensors. Where this fails, verl may pass it on by itself."""
    source = inspect.getsource(engine_workers.ActorRolloutRefWorker.update_weights)
    assert "per_tensor_param, _ = self.actor.engine.get_per_tensor_param()" in source

"""Runs an engine with its own base and one on a shared base, for each checkpoint.

Usage: shared_families_process.py OUT JSON_PROMPTS DTYPE CHECKPOINT [CHECKPOINT ...]

As in ``families_process.py``, the engines run in this process, and so does the owner of the shared
base.
"""

import json
import os
import sys
import traceback

# sets the environment, first of all
from tests.rollout.families_process import LORA, log_probabilities, start_engine

# isort: split
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from qerl_verl.config.base import LOAD_FORMAT
from qerl_verl.job import Job
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.candidates import CANDIDATES
from qerl_verl.nvfp4.loading import packed_linear_names, swap_linears
from qerl_verl.rollout.probes import base_digest
from qerl_verl.sharing.base import OtherSide, load_base, plan_layout
from qerl_verl.sharing.channel import BaseOwner
from qerl_verl.sharing.memory import SharedMemory
from tests.helpers.jobs import sharing_job

CPU = torch.device("cpu")
OWNERS = []


def own_base(checkpoint, dtype):
    """Starts this process's own base, which lasts to its end, and returns which tensors are shared
    in place.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    swap_linears(model, packed_linear_names(checkpoint), torch.bfloat16)
    other = OtherSide("auto", CANDIDATES, LORA["rank"], dtype)
    layout = plan_layout(model, get_architecture(config), CPU, dtype, "auto", other)
    memory = SharedMemory.allocate(layout.size, CPU)
    layout, _ = load_base(model, checkpoint, layout, memory, torch.bfloat16, dtype, "auto")
    job = sharing_job(rank=LORA["rank"], dtype=str(dtype).removeprefix("torch."))
    os.environ |= job.environment()
    names = sorted(name for name, plain in layout.tensors.items() if plain.shared)
    OWNERS.append(BaseOwner((memory, layout), job.sharing.key, 0))
    return names


def look_at(checkpoint, prompts, dtype, load_format):
    engine = start_engine(checkpoint, dtype, load_format=load_format)
    seen = {"log_probs": log_probabilities(engine, prompts), "digest": engine.collective_rpc(base_digest)}
    engine.llm_engine.engine_core.shutdown()
    return seen


if __name__ == "__main__":
    out, prompts, dtype, *folders = sys.argv[1:]
    prompts, found = json.loads(prompts), {}
    for checkpoint in folders:
        try:
            # first: where vLLM runs a model through transformers' code, it changes the class for
            # this process
            names = own_base(checkpoint, getattr(torch, dtype))
            separate = look_at(checkpoint, prompts, dtype, "safetensors")
            shared = look_at(checkpoint, prompts, dtype, LOAD_FORMAT)
            found[checkpoint] = {"separate": separate, "shared": shared, "in_place": names}
        except Exception:
            found[checkpoint] = {"error": traceback.format_exc()}
        os.environ |= Job().environment()
    with open(out, "w") as file:
        json.dump(found, file)

"""A job for ``test_lost_node.py``: a rank on each node, summing with gloo until the job ends. Its
argument is a file that appears once they do."""

import os
import sys
import time
from pathlib import Path

import ray

from qerl_verl.platform.lost_nodes import watch_nodes


@ray.remote(num_gpus=1)
class Rank:
    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def sum_for_ever(self, rank: int, method: str, begun: str) -> None:
        import torch

        from qerl_verl.platform.cpu import PlatformCPU

        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "RAY_LOCAL_WORLD_SIZE": "1", "DIST_INIT_METHOD": method}
        PlatformCPU().communication_backend_name()  # brings the process group up
        while True:
            one = torch.ones(1)
            torch.distributed.all_reduce(one)
            assert one.item() == 2
            Path(begun).touch()
            time.sleep(0.1)


watch = watch_nodes()
ray.init(log_to_driver=False)
ranks = [Rank.remote() for _ in range(2)]
addresses = ray.get([rank.address.remote() for rank in ranks])
print("ranks on", sorted(addresses), flush=True)
try:
    method = f"tcp://{addresses[0]}:29533"
    ray.get([rank.sum_for_ever.remote(i, method, sys.argv[1]) for i, rank in enumerate(ranks)])
except ray.exceptions.RayError as error:
    for node in watch.find_lost(error, print):
        print("lost:", node, flush=True)
    sys.exit(1)

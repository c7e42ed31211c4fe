"""Ask a cluster that grows by itself for GPUs, and wait for the first one.

    python cluster/request_gpus.py 8

To be run on a node of the cluster. They are kept until another number is asked for: 0 lets them go when they are idle.
"""

from __future__ import annotations

import sys
import time

import ray
from ray.autoscaler.sdk import request_resources


def main(num_gpus: int) -> None:
    ray.init(address="auto", logging_level="ERROR")
    request_resources(bundles=[{"GPU": 1}] * num_gpus)
    while num_gpus and not ray.cluster_resources().get("GPU"):
        print("Waiting for the first GPU", flush=True)
        time.sleep(10)
    print(f"{num_gpus} GPUs are wanted, {ray.cluster_resources().get('GPU', 0):.0f} are there")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit("usage: python cluster/request_gpus.py NUMBER")
    main(int(sys.argv[1]))

from dataclasses import replace

from muxmesh.cuda.driver import DeviceInfo
from muxmesh.machine_limits import num_usable_cores
from muxmesh.profiler.machine_facts import cpu_facts, gpu_facts

GPU = DeviceInfo(0, "GPU-0", "A GPU", 100, (9, 0), 80 << 30, True, True, False)


def test_a_cpu_has_a_name_and_the_cores_that_this_process_may_use() -> None:
    facts = cpu_facts()
    assert facts.device == "cpu" and facts.name and facts.memory_bytes > 0
    assert facts.cores == num_usable_cores()


def test_gpus_of_the_same_kind_are_counted() -> None:
    devices = [GPU, replace(GPU, index=1, name="Another"), replace(GPU, index=2)]
    facts = gpu_facts(devices, 2)
    assert (facts.device, facts.name, facts.num_devices, facts.cores) == ("cuda", "A GPU", 2, 0)
    assert facts.memory_bytes == 80 << 30

"""A TPU as a target of the compiler, on a machine without a TPU."""

from jaxlm.plan import topology
from jaxlm.sharding import Sharding, make_mesh


def one_tpu(name: str) -> Sharding:
    """A mesh of one device of the topology, such as "v5e:2x2"."""
    topology.prepare_environment()
    return Sharding(make_mesh({"data": 1}, devices=[topology.get_topology(name).devices[0]]))

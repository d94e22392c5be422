"""The contract tests for every family of the package, and tests of further meshes for one to three families."""

import pytest

from jaxlm.models import FAMILIES  # noqa: F401 (read by the contract)
from jaxlm.testing.contract import *  # noqa: F403
from jaxlm.testing.contract import check_sharded_step


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,tensor=4", "fsdp=4,sequence=2"])
def test_each_mesh_equals_a_single_device(mesh):
    check_sharded_step("gpt2-tiny", mesh)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("gpt2-tiny", "data=2,fsdp=2,tensor=2"), ("t5-tiny", "fsdp=4,tensor=2"), ("transformer-xl-tiny", "data=8")],
)
def test_sharded_step_with_stacked_layers_equals_single_device_step(name, mesh):
    check_sharded_step(name, mesh, scan_layers=True)

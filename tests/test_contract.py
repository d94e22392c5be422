"""The contract tests for every family of the package, and for meshes that need one family only."""

import pytest

from jaxlm.models import FAMILIES  # noqa: F401 (read by the contract)
from jaxlm.testing import contract
from jaxlm.testing.contract import *  # noqa: F403
from jaxlm.testing.contract import REPRESENTATIVES, check_sharded_step

# Plain pytest runs these tests, which take the most time, only for some families.
for test in (
    contract.test_remat_and_attention_implementation_do_not_change_loss_and_gradients,
    contract.test_every_dropout_rate_acts_only_with_a_key,
    contract.test_bfloat16_is_finite_and_near_float32,
    contract.test_each_position_depends_on_exactly_the_visible_positions,
    contract.test_padding_does_not_change_the_other_positions,
    contract.test_packed_documents_equal_separate_documents,
    contract.test_cached_equals_full_at_every_position,
    contract.test_rows_of_unequal_length_decode_independently,
    contract.test_a_prefix_branches_and_each_branch_rolls_back,
    contract.test_a_token_id_outside_the_vocabulary_gives_nan,
    contract.test_sharded_step_equals_single_device_step,
    contract.test_runs_under_an_explicit_mesh_and_in_shard_map,
    contract.test_loss_falls_in_twenty_steps_without_recompiling,
):
    pytest.mark.plain_cases(name=REPRESENTATIVES)(test)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,tensor=4", "fsdp=4,sequence=2"])
def test_each_mesh_equals_a_single_device(mesh):
    check_sharded_step("gpt2-tiny", mesh)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("gpt2-tiny", "data=2,fsdp=2,tensor=2"), ("t5-tiny", "fsdp=4,tensor=2"), ("transformer-xl-tiny", "data=8")],
)
def test_sharded_step_with_stacked_layers_equals_single_device_step(name, mesh):
    check_sharded_step(name, mesh, scan_layers=True)

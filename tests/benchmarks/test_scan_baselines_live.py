"""The baselines of ``benchmarks.scans`` in other libraries compute the same outputs and gradients as jaxlm."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from benchmarks import harness, scans, shapes
from benchmarks.worker import find

pytestmark = pytest.mark.live

CASES = {f"{case.op}-{dict(case.sizes).get('decays', '')}".strip("-"): case.quick() for case in shapes.SCANS}


def results(name: str, case: shapes.Scan) -> dict[str, list[float]]:
    """Samples of the output and of all gradients."""
    measured: Any = find(scans.IMPLEMENTATIONS[name])(directory="", op=case.op, sizes=dict(case.sizes), backward=True)
    measured.prepare()
    # JLA uses implicit rank promotion, which jaxlm never does.
    with jax.numpy_rank_promotion("allow" if name == "jla" else "raise"):
        return measured.read(measured.run())


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case_name}")
        for case_name, case in CASES.items()
        for name in scans.BASELINES[case.op]
        if name in ("torch", "fla", "jla")
    ],
)
def test_a_baseline_agrees_with_jaxlm(name: str, case: shapes.Scan) -> None:
    if name == "jla":
        pytest.importorskip("jla", reason="jax-linear-attention needs Python 3.12")
    harness.check_samples({harness.JAXLM: [results(harness.JAXLM, case)], name: [results(name, case)]}, 2e-5)

"""Plans: compile a step for accelerators that the machine does not have, and report the compiler's estimates.

    fits or not · bytes per device · FLOPs · collectives · estimated step time and MFU · the most expensive operations

The step does not run. The estimated time is a number of cycles, divided by the clock rate. The cycles are the
compiler's estimates for the operations of the schedule (``hlo``), plus the cycles of Pallas kernels (``kernels``). The
time does not include the communication between devices, for which a plan gives a lower bound.
"""

from jaxlm.plan.planning import Plan, plan
from jaxlm.plan.report import show
from jaxlm.plan.topology import prepare

__all__ = ["Plan", "plan", "prepare", "show"]

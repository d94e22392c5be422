"""Plans: compile a step for accelerators that the machine does not have, and report the compiler's estimates.

    fits or not · bytes per device · FLOPs · collectives · estimated step time and MFU · the most expensive operations

The step does not run. The time is the sum of the compiler's cycle estimates for the operations of the schedule
(``hlo``) and of the cycles of Pallas kernels (``kernels``), divided by the clock rate. It does not include the
communication between devices, for which a plan gives a lower bound.
"""

from jaxlm.plan.planning import Plan, plan
from jaxlm.plan.report import show
from jaxlm.plan.topology import prepare

__all__ = ["Plan", "plan", "prepare", "show"]

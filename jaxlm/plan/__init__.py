"""Plans: compile a step for accelerators that the machine may lack, and report the compiler's estimates.

A plan says whether the step fits into memory. It contains the bytes per device, the FLOPs, the collectives, the
estimated time and MFU of the step, and its most expensive operations.

The step does not run. Its estimated time is a number of cycles divided by the clock rate. The cycles are the compiler's
estimates for the operations of the schedule (``jaxlm.plan.hlo``) plus the cycles of Pallas kernels
(``jaxlm.plan.kernels``). Only the compiler for TPUs estimates cycles. The time does not include the communication
between devices. A plan gives a lower bound of the time of this communication.
"""

from jaxlm.plan.planning import Plan, check_meshes, plan
from jaxlm.plan.report import show
from jaxlm.plan.topology import prepare_environment

__all__ = ["Plan", "check_meshes", "plan", "prepare_environment", "show"]

"""Plans: compile a step for accelerators that one does not have, and read what the compiler says of it.

    fits or not · bytes a device · FLOPs · collectives · estimated step time and MFU · the dearest operations

Nothing is measured: the time is the compiler's own estimate, added up over its schedule (``hlo``).
"""

from jaxlm.plan.planning import Plan, plan
from jaxlm.plan.report import show
from jaxlm.plan.topology import prepare

__all__ = ["Plan", "plan", "prepare", "show"]

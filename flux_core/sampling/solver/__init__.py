"""ODE solvers for dx/dsigma = velocity(x, sigma), for any callable `Velocity`: they do not know the model.

  base.py        Solver, the loop over a schedule, integrate and the report of a run
  onestep.py     euler, heun, midpoint, rk4
  multistep.py   heun_corrected, ab2, ab3: they use earlier velocities
  adaptive.py    dormand_prince: chooses its own steps, within a tolerance
  stochastic.py  euler_ancestral: adds noise at every step

To add a one-step method, write its step function with a citation in onestep.py and one line in SOLVERS; for
any other, a `Solver` in a file of its own and one line in SOLVERS. Nodes and command lines list SOLVERS.

While sigmas descend, no solver evaluates the velocity at sigma 0: a host that only knows the denoised image
has velocity = (x - denoised) / sigma, which is 0/0 there. A method that would do so uses another one for its
last step. A single step may have a local error of h^p without lowering the order p of the whole path (the
steps shrink together; compare Hairer, Norsett and Wanner, Solving ODEs I, section II.3), so there, and where
a multistep method starts, a method of order p - 1 is enough. The tests measure the order with these steps
included. While sigmas ascend, the first evaluation is at sigma 0 if the path starts there.
"""

from .adaptive import DormandPrince, dormand_prince_step
from .base import Noise, Report, Result, Solver, Step, fixed_step_loop, integrate
from .multistep import AdamsBashforth, CorrectedHeun, adams_bashforth_step
from .onestep import OneStep, StepFunction, euler_step, heun_step, midpoint_step, ralston3_step, rk4_step
from .stochastic import EulerAncestral, seeded_noise

__all__ = [
    "SOLVERS",
    "AdamsBashforth",
    "CorrectedHeun",
    "DormandPrince",
    "EulerAncestral",
    "Noise",
    "OneStep",
    "Report",
    "Result",
    "Solver",
    "Step",
    "StepFunction",
    "adams_bashforth_step",
    "dormand_prince_step",
    "euler_step",
    "fixed_step_loop",
    "heun_step",
    "integrate",
    "midpoint_step",
    "ralston3_step",
    "rk4_step",
    "seeded_noise",
    "solver_named",
]

SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        OneStep("euler", 1, euler_step, euler_step),
        OneStep("heun", 2, heun_step, midpoint_step),
        OneStep("midpoint", 2, midpoint_step, midpoint_step),
        OneStep("rk4", 4, rk4_step, ralston3_step),
        CorrectedHeun("heun_corrected", 2),
        AdamsBashforth("ab2", 2, euler_step),
        AdamsBashforth("ab3", 3, midpoint_step),
        DormandPrince(),
        EulerAncestral(),
    )
}
"""The solvers by name, in the order of the menu: saved workflows need the names, so only append."""


def solver_named(name: str) -> Solver:
    """The solver of that name. Raises ValueError for an unknown one."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    return SOLVERS[name]

"""ODE solvers for dx/dsigma = velocity(x, sigma), each over any `Velocity`: they see nothing of a model.

  base.py        Solver, the loop over a schedule, integrate and the report of a run
  onestep.py     euler, heun, midpoint, rk4
  multistep.py   heun_corrected, ab2, ab3: they remember earlier velocities
  adaptive.py    dormand_prince: chooses its own steps, within a tolerance
  stochastic.py  euler_ancestral: adds noise on the way

On the way down no solver asks for the velocity at sigma 0: a host that only gives the denoised picture has
velocity = (x - denoised) / sigma, which is 0/0 there. A method that would ask takes its last step by another
one. A single step may have a local error of h^p without lowering the order p of the whole path (the steps
shrink together; compare Hairer, Norsett and Wanner, Solving ODEs I, section II.3), so there, and where a
multistep method starts, a method of order p - 1 is enough; the tests measure the order with these steps
included. On the way up the first velocity is asked for at sigma 0, if the path starts there.
"""

from .adaptive import DormandPrince, dormand_prince_step
from .base import Noise, Report, Solver, Step, integrate
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
    "Solver",
    "Step",
    "StepFunction",
    "adams_bashforth_step",
    "dormand_prince_step",
    "euler_step",
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
"""The solvers by name, in the order in which a menu shows them: only append."""


def solver_named(name: str) -> Solver:
    """The solver of that name. Raises ValueError with the names there are."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    return SOLVERS[name]

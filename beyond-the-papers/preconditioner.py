"""A linear teleport is a preconditioner, for good; what is left of the others beside tuned rates. Not in the papers.

Identity: 784-16-10-10 is moved by a positive rescaling of all its hidden units and trained by torch's optimizers, with
weight decay and without; its untouched twin, with per-unit rates, ε and decays by the table of twins.py, draws the same
curve, in float64 down to rounding. Rounding is largest in steps that normalize a gradient seen for the first time:
where the batch's terms cancel to a millionth, a millionth of the digits decides the step.

Comparison, at the settings of Figure 5 (ICLR 2024): eight teleports before the first mini-batches of the first epoch,
each ten ascent steps on ‖∂L/∂W‖² on a fresh batch of 200, the optimizer's memory kept (SGD, which the paper leaves out,
has the others' lr_t). The arms:

  baseline       the optimizer alone
  preactivation  the pre-activation action: nonlinear, fitted to its batch
  linear part    the positive rescaling nearest to what that action does (least squares): by the identity, rates per
                 unit and nothing else
  rescaling      ascent along positive rescalings, exact
  layer rates    no teleport; one learning rate for each layer, found in as many tuning runs as the pre-activation
                 teleport takes (layer_rates.py)

Rates are tuned on other runs, the arms compared on fresh ones, as common/protocol.py has it, in one number a run. On
the first teleport's batch: how much longer the gradient becomes, and how much further the optimizer's next step on that
batch goes down, by the whole action and by its linear part.
"""

from common.claims import Claim

CLAIM = Claim(
    order=190,
    figure="Preconditioner",
    paper="beyond the papers",
    section="",
    says="A run after a positive rescaling is the untouched run with rates of its own for every unit; and the paper's "
    "nonlinear teleport is no better than rates tuned layer by layer.",
    short="a teleport is a preconditioner",
    rule="holds if over 200 steps of six optimizers, with weight decay and without, the rescaled run's weights, pulled "
    "back, differ from its untouched twin's by 1e-10 at most and by 1e-12 in a single step, relatively, in float64, "
    "and for SGD and Adam the pre-activation teleport is equivalent to layer rates or worse in mean log training loss, "
    "each at its best rates; in part: the identity, but for one optimizer or both it is better; undecided: better for "
    "none and undecided for some; does not hold: no identity. Layer rates have as many tuning runs as the teleport; "
    "tuned on other runs, interior; paired by seed; margin 1 %; Holm over the optimizers. How much of the teleport its "
    "linear part is, is said beside and decides nothing.",
    dated="2026-11-30",
    source="Ours",
)

"""Teleport your own model: find its symmetries, move it along them in place, leave its function alone.

    teleporter = Teleporter(model, optimizer=optimizer)
    print(teleporter)                                   # what moves; what is left alone, and why
    moved = teleporter.step(x, lambda output: F.cross_entropy(output, y))
    moved.drift                                         # loss_after - loss_before: rounding

A symmetry is a hidden space with parameters that write into it and parameters that read from it. An element M moves the
writers by M and the readers by M^-T, so that what passes between them stays the same:

    "rescale"     M = diag(s), s > 0: channels between layers that positively homogeneous operations join (ReLU, leaky
                  ReLU, dropout, pooling, flattening, residual additions). Writers: Linear, Conv, ConvTranspose,
                  Embedding, MultiheadAttention's output, the scale and shift of a normalization. Readers: Linear, Conv,
                  ConvTranspose, MultiheadAttention's inputs. A residual stream is one space.
    "attention"   M in GL(d_head), one per head: queries write and keys read, since q·k is preserved; values write and
                  the output projection reads.
    "linear"      M in GL(r) between two linear maps with nothing in between (LoRA, low-rank factors). With inputs.
    "rotary"      M = a R(θ) for each pair of entries that rotary positions rotate: queries write and keys read. It
                  commutes with the positions' own rotations; a normalization of queries and keys forbids it. Found with
                  inputs of more than one token, or given by hand.
    "stream"      M in O(d) on the residual stream of a transformer whose norms are RMSNorms: embeddings and output
                  projections write, what comes after the norms reads. Gains γ stay, and readers move by γ M^T γ^-1: no
                  gain has to be folded, and −T moves back. LayerNorm forbids it. Gradient norms do not feel it (with
                  gains of one), so that only other objectives move along it: Adam's look-ahead, your own. Found with
                  inputs, or given by hand.

With `inputs=`, one real run is followed operation by operation, whatever the model is written in: products (SwiGLU),
concatenations, grouped convolutions, gains, attention in any form. Without, the graph that torch.fx finds is searched.

All are exact for every input, in training and in evaluation mode. A BatchNorm between two layers is no obstacle: its
scale and shift are the writer, its statistics stay. What comes before a normalization is left alone: in training mode
the loss does not depend on its scale (up to ε), so that moving it would only change its learning rate; in evaluation
mode it could be traded against the scale and statistics of the BatchNorm, but that breaks when training goes on.

    "preactivation", "postactivation"   g in GL(width) between two Linear (teleport.py). Data-dependent: exact on a
                  batch no larger than the layer, a least-squares fit otherwise. Only on request, and on their own.

    "permutation" orders of hidden units, of any activation, of heads, of a residual stream. Only on request and on its
                  own, since no gradient leads there: `permute` moves, `undo` takes back bit for bit. All that belongs
                  to a unit moves along: gradients, optimizer state, averaged copies, statistics of a BatchNorm, slopes,
                  gains, saved buffers. Whatever tells units apart by their position (slices, softmax, constants,
                  operations without a rule) leaves them alone. The function is the same in evaluation mode, up to the
                  order of sums; in training mode dropout meets other units.

        Teleporter(model, "permutation", inputs=x, optimizer=optimizer).permute({"fc1 -> fc2": order})

Gradients move against the weights: where L is invariant, ∂L/∂W of a writer moves by M^-T, that of a reader by M. One
gradient G therefore gives the gradient norm on the whole orbit, and its derivative at M = exp(T), T = 0,

    ∂‖∂L/∂W‖²/∂T = 2 (Σ_readers G Gᵀ − Σ_writers G Gᵀ)    (its diagonal for a rescaling; rows of G: the space).

It equals what a Hessian-vector product would give, 2 (Σ_writers HG Wᵀ − Σ_readers W (HG)ᵀ), which is what any other
objective uses. The norm has no maximum on the orbit: `bound` makes one.

Two need no symmetry: `level_set_teleport` (Mishkin, Bietti, Gower, AISTATS 2025, arXiv 2403.03362) stays below the loss
of a batch; `null_space_teleport` (after Wu, Dong, Aloui, Tarokh 2025, arXiv 2502.11362) changes each layer only where
its inputs on a batch do not reach.
"""

from teleporter.level_set import level_set_teleport
from teleporter.low_rank import LowRankRotation
from teleporter.null_space import null_space_teleport
from teleporter.rotations import Rotary, Stream
from teleporter.symmetry import Attention, Pair
from teleporter.teleporter import Teleporter

__all__ = [
    "Attention",
    "LowRankRotation",
    "Pair",
    "Rotary",
    "Stream",
    "Teleporter",
    "level_set_teleport",
    "null_space_teleport",
]

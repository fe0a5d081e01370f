"""WKV7 in chunks by plain PyTorch matmuls: the fallback that needs no compiler and runs on any device.

With P_t the product of the decays d_1..d_t of a chunk, write
    A_t = a_t P_{t-1}    R_t = r_t P_t    K_t = k_t / P_t    B_t = b_t / P_t.
Then, S0 being the state that enters the chunk, the rows u_t = S_{t-1} a_t and y_t come from
    U = A S0^T + tril(A B^T, -1) U + tril(A K^T, -1) V          (a unit triangular system for U)
    Y = R S0^T + tril(R B^T) U + tril(R K^T) V
    S = (S0 + V^T K + U^T B) diag(P_last).
A decay is at least exp(-exp(-1/2)) = 0.545, so 1/P <= 2^14 in a chunk of 16: nothing overflows and no digits are lost.
Source: the chunk form of the delta rule, arXiv 2412.06464, with RWKV-7's vector-valued decay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import state_dtype
from .packing import per_sequence
from .reference import DECAY_SCALE

CHUNK = 16


def _log_decay(w: Tensor) -> Tensor:
    # Not torch.sigmoid: autograd takes its slope as s (1 - s), which has lost its digits where s is near 1.
    return DECAY_SCALE * F.logsigmoid(w).exp()


@per_sequence
def wkv7_chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """r, w, k, v, a, b [B, T, H, N], state [B, H, N, N] -> y [B, T, H, N], final state. Maths in float32 (float64 for float64 inputs)."""
    dtype, (B, T, H, N) = state_dtype(r.dtype), r.shape
    n = -(-T // CHUNK)

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, N] -> [n, B*H, CHUNK, N]; padding tokens are zero and change no state
        x = x.to(dtype)
        if T % CHUNK:
            x = F.pad(x, (0, 0, 0, 0, 0, n * CHUNK - T))
        return x.view(B, n, CHUNK, H, N).permute(1, 0, 3, 2, 4).reshape(n, B * H, CHUNK, N)

    R, K, V, A, Bt = (chunks(x) for x in (r, k, v, a, b))
    log_d = chunks(_log_decay(w.to(dtype)))
    log_P = log_d.cumsum(2)
    P = log_P.exp()
    A, R = A * (log_P - log_d).exp(), R * P
    inverse_P = (-log_P).exp()
    KB = torch.cat([K * inverse_P, Bt * inverse_P], dim=2)
    M = torch.cat([A, R], dim=2) @ KB.mT
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=M.device).tril(-1)
    until = earlier.logical_or(torch.eye(CHUNK, dtype=torch.bool, device=M.device))
    M = M.where(torch.cat([earlier.repeat(1, 2), until.repeat(1, 2)]), 0)
    AK, AB, RKB = M[:, :, :CHUNK, :CHUNK], M[:, :, :CHUNK, CHUNK:], M[:, :, CHUNK:]
    # Forward substitution and not a product of powers of AB: those grow without bound when keys repeat.
    identity = torch.eye(CHUNK, dtype=dtype, device=M.device)
    X = torch.linalg.solve_triangular(identity - AB, identity.expand_as(AB), upper=False, unitriangular=True)
    XAR = torch.cat([X @ A, R], dim=2)
    XAKV = X @ (AK @ V)
    P_last = P[:, :, -1]
    KB_last = (KB * P_last.unsqueeze(2)).mT

    S = V.new_zeros(B * H, N, N) if initial_state is None else initial_state.reshape(B * H, N, N).mT  # key rows, value columns
    y = []
    # Unbound at once: the backward of indexing in the loop would build a zero tensor of the whole for every chunk.
    for xar, xakv, rkb, kb, p, value in zip(*(x.unbind(0) for x in (XAR, XAKV, RKB, KB_last, P_last.unsqueeze(-1), V))):
        Q = xar @ S
        VU = torch.cat([value, Q[:, :CHUNK] + xakv], dim=1)
        y.append(torch.baddbmm(Q[:, CHUNK:], rkb, VU))
        S = torch.baddbmm(S * p, kb, VU)
    Y = torch.stack(y).view(n, B, H, CHUNK, N).permute(1, 0, 3, 2, 4).reshape(B, n * CHUNK, H, N)
    return Y[:, :T].to(r.dtype), S.mT.reshape(B, H, N, N).contiguous()

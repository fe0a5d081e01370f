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

from .arguments import state_dtype
from .packing import per_sequence
from .reference import DECAY_SCALE

CHUNK = 16


def _log_decay(w: Tensor) -> Tensor:
    # Autograd takes the slope as s (1 - s), which has lost its digits where s is near 1: there, the slope of sigmoid(-w) serves.
    return DECAY_SCALE * torch.where(w > 0, 1 - torch.sigmoid(-w), torch.sigmoid(w))


@per_sequence
def wkv7_chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """r, w, k, v, a, b [B, T, H, N], state [B, H, N, N] -> y [B, T, H, N], final state. Maths in float32 (float64 for float64 inputs)."""
    dtype, (B, T, H, N) = state_dtype(r.dtype), r.shape
    n = -(-T // CHUNK)

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, N] -> [n, B*H, CHUNK, N]; padding tokens are zero and change no state
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, n * CHUNK - T))
        return x.view(B, n, CHUNK, H, N).permute(1, 0, 3, 2, 4).reshape(n, B * H, CHUNK, N)

    R, K, V, A, Bt = (chunks(x) for x in (r, k, v, a, b))
    log_d = chunks(_log_decay(w.to(dtype)))
    log_P = log_d.cumsum(2)
    P = log_P.exp()
    A, R = A * (log_P - log_d).exp(), R * P
    KB = torch.cat([K, Bt], dim=2) * (-log_P).exp().repeat(1, 1, 2, 1)
    M = torch.cat([A, R], dim=2) @ KB.mT
    strict = M.new_ones(CHUNK, CHUNK, dtype=torch.bool).tril(-1)
    AK = M[:, :, :CHUNK, :CHUNK].where(strict, 0)
    AB = M[:, :, :CHUNK, CHUNK:].where(strict, 0)
    RKB = M[:, :, CHUNK:].where(strict.logical_or(torch.eye(CHUNK, dtype=torch.bool, device=M.device)).repeat(1, 2), 0)
    # Forward substitution and not a product of powers of AB: those grow without bound when keys repeat.
    identity = torch.eye(CHUNK, dtype=dtype, device=M.device)
    X = torch.linalg.solve_triangular(identity - AB, identity.expand_as(AB), upper=False, unitriangular=True)
    XAR = torch.cat([X @ A, R], dim=2)
    XAKV = X @ (AK @ V)
    P_last = P[:, :, -1]
    KB_last = (KB * P_last.unsqueeze(2)).mT

    S = V.new_zeros(B * H, N, N) if initial_state is None else initial_state.reshape(B * H, N, N).mT  # key rows, value columns
    y = []
    for c in range(n):
        Q = XAR[c] @ S
        VU = torch.cat([V[c], Q[:, :CHUNK] + XAKV[c]], dim=1)
        y.append(torch.baddbmm(Q[:, CHUNK:], RKB[c], VU))
        S = torch.baddbmm(S * P_last[c].unsqueeze(-1), KB_last[c], VU)
    Y = torch.stack(y).view(n, B, H, CHUNK, N).permute(1, 0, 3, 2, 4).reshape(B, n * CHUNK, H, N)
    return Y[:, :T].to(r.dtype), S.mT.reshape(B, H, N, N).contiguous()

"""`python -m rwkvlm compress`: a smaller model from a trained one, by two factors for each matrix and fewer hidden units."""

from __future__ import annotations

from pathlib import Path

from ..config import UserError
from .flags import Parser


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m rwkvlm compress", description="Write a smaller model, which generates and trains on like any other.")
    parser.add_argument("--model", required=True, help="checkpoint of an RWKV-7 or a Phantom")
    parser.add_argument("--out", required=True, help="checkpoint to write")
    parser.add_argument(
        "--svd_rank_ratio",
        type=float,
        default=1.0,
        help="share of each large matrix's parameters that its two factors keep; 1: no factors [1]",
    )
    parser.add_argument("--sparsity_ratio", type=float, default=0.0, help="share of the FFN's hidden units that are removed; 0: none [0]")
    parser.add_argument(
        "--data",
        default="",
        help="PREFIX of a .bin/.idx pair: units are judged by what they do on it, and the loss is measured on PREFIX.val",
    )
    parser.add_argument("--ctx_len", type=int, default=512, help="tokens in each sequence of --data that is read [512]")
    parser.add_argument("--samples", type=int, default=32, help="how many of these are read [32]")
    parser.add_argument("--report", type=Path, default=None, help="write the figures here as JSON too")
    args = parser.parse_args(argv)
    if args.svd_rank_ratio == 1 and args.sparsity_ratio == 0:
        raise UserError("nothing to compress: give --svd_rank_ratio, for example 0.5, --sparsity_ratio, for example 0.3, or both")
    from ..checkpoint.place import check_file, write_json  # torch takes seconds to import: wrong flags are answered before
    from ..compress import compress_file, report_lines

    if args.report is not None:
        check_file(args.report, "--report")
    report = compress_file(args.model, args.out, args.svd_rank_ratio, args.sparsity_ratio, args.data, args.ctx_len, args.samples)
    print("\n".join(report_lines(report)))
    if args.report is not None:
        write_json(args.report, report, "--report", f"the model is in {args.out}, choose another name")
    return 0

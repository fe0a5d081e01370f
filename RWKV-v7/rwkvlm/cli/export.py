"""`python -m rwkvlm export`: a model as released RWKV-7 files are, for the programs that accept no other form."""

from __future__ import annotations

from .flags import Parser


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m rwkvlm export",
        description="Write a model as released RWKV-7 files are: "
        "without block 0's v0, v1, v2, which nothing reads, and with whole matrices in the place of factors.",
    )
    parser.add_argument(
        "--model", required=True, help="checkpoint of an RWKV-7, also a compressed one, or of a Phantom without test-time training"
    )
    parser.add_argument("--out", required=True, help="checkpoint to write")
    args = parser.parse_args(argv)
    from ..compress.export import export_file  # torch takes seconds to import: wrong flags are answered before

    export_file(args.model, args.out)
    print(f"wrote {args.out}")
    return 0

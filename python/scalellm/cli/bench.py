"""`scalellm bench WHAT`: each kind of bench is a module `scalellm.cli.bench_WHAT`."""

import argparse

from scalellm.cli import bench_compare, bench_kernels, bench_offline, bench_serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    for module in (bench_serve, bench_compare, bench_offline, bench_kernels):
        module.add_command(commands)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.bench_run(arguments))
